"""Multi-task learning: shared bottom, MMoE, PLE and others, and estimators for tables.

A *body* maps rows to the features of each task, mostly by experts that tasks share through gates of
their own (MMoE, Ma et al. 2018). A *tower* per task maps its features to its outputs.

Annotations of this package have axis letters of their own: b rows, d numbers of a row, t tasks, e
experts, k selectors of a gate, f features, q outputs of a task.

>>> from vmoe.multitask import MultiTaskClassifier
>>> MultiTaskClassifier("mmoe", n_experts=4)
MultiTaskClassifier(n_experts=4)
"""

from vmoe.multitask.bodies import (
    Body,
    BodyOutput,
    CrossStitch,
    MultiGate,
    Ple,
    PleLayer,
    SharedBottom,
)
from vmoe.multitask.chains import AdaptiveTransfer, Aitm, Esmm, TaskNetworks
from vmoe.multitask.estimator import MultiTaskClassifier, MultiTaskEstimator
from vmoe.multitask.expert_use import plot_expert_use
from vmoe.multitask.gates import DSelectK, Gated, HiddenGate, Softmax, TaskGate
from vmoe.multitask.history import plot_history
from vmoe.multitask.model import MultiTask

__all__ = [
    "AdaptiveTransfer",
    "Aitm",
    "Body",
    "BodyOutput",
    "CrossStitch",
    "DSelectK",
    "Esmm",
    "Gated",
    "HiddenGate",
    "MultiGate",
    "MultiTask",
    "MultiTaskClassifier",
    "MultiTaskEstimator",
    "Ple",
    "PleLayer",
    "SharedBottom",
    "Softmax",
    "TaskGate",
    "TaskNetworks",
    "plot_expert_use",
    "plot_history",
]
