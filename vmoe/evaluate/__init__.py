"""Evaluation of a trained model on a split, and predictions for single images."""

from vmoe.evaluate.classification import (
    Difference,
    Evaluation,
    NamedEvaluation,
    check_evaluation,
    evaluate,
    paired_difference,
)
from vmoe.evaluate.predict import Prediction, image_files, predict

__all__ = [
    "Difference",
    "Evaluation",
    "NamedEvaluation",
    "Prediction",
    "check_evaluation",
    "evaluate",
    "image_files",
    "paired_difference",
    "predict",
]
