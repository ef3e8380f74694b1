"""Data sets as files, each from where its authors or distributors keep it."""
