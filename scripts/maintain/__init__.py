"""What keeps the files of this repository up to date that are made by programs."""
