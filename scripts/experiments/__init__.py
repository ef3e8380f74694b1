"""Experiments whose results stand in docs/results: ``python -m scripts.experiments NAME``.

An experiment is a module, or a package with a ``command``: its rows, its tables, its answer and its
plots. ``framework`` is shared by all. ``rows`` has what was measured; ``results`` writes the pages.
"""
