"""Evaluation of a trained model on a split, and predictions for single images."""

from vmoe.evaluate.classification import (
    Evaluation,
    NamedEvaluation,
    check_evaluation,
    evaluate,
)
from vmoe.evaluate.predict import Prediction, image_files, predict

__all__ = [
    "Evaluation",
    "NamedEvaluation",
    "Prediction",
    "check_evaluation",
    "evaluate",
    "image_files",
    "predict",
]
