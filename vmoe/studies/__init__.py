"""What one asks of a trained model beyond its accuracy: a room for each question.

A room holds the question (its ``__init__``), the program that answers it, and ``command``, which
``vmoe.cli.main`` finds by its name. Nothing in the package imports a study, and studies do not
import each other.
"""
