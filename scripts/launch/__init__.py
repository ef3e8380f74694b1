"""Runs on clusters, and the check of a GPU machine."""
