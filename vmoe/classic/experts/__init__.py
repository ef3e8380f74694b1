"""The kinds of experts, a file each; `make` finds them by name."""
