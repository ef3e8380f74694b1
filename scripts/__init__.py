"""What one does in this repository, beside the library: see README.md."""
