"""What a trained model is worth: on a split, and on single images."""

from vmoe.evaluate.classification import Evaluation, NamedEvaluation, evaluate
from vmoe.evaluate.predict import Prediction, image_files, predict

__all__ = ["Evaluation", "NamedEvaluation", "Prediction", "evaluate", "image_files", "predict"]
