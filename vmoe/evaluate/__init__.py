"""Evaluation of a trained model on a split, and predictions for single images."""

from vmoe.evaluate.classification import Evaluation, NamedEvaluation, evaluate
from vmoe.evaluate.predict import Prediction, image_files, predict

__all__ = ["Evaluation", "NamedEvaluation", "Prediction", "evaluate", "image_files", "predict"]
