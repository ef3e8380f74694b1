"""Studies of a trained model beyond its accuracy, one package per question.

A package has the question (in its ``__init__``), the program that answers it, and ``command``,
which ``vmoe.cli.main`` finds by its name. No other part of vmoe imports a study, and studies do not
import each other.
"""
