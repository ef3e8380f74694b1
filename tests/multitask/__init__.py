"""Tests of models of several tasks."""
