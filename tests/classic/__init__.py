"""Tests of the classic mixtures."""
