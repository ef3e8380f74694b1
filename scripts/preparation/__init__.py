"""Shared code of the scripts that prepare data sets."""
