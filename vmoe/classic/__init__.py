"""Classic mixtures of experts, from before V-MoE, as estimators of scikit-learn.

Flat mixtures (Jacobs et al. 1991) and hierarchical ones (Jordan & Jacobs 1994), fitted by EM in
numpy and scipy, in float64.

Annotations of this package have axis letters of their own: n rows, u rows or groups of them, d
columns, p columns and the intercept, e experts, k children of a gate, q outputs (or classes, for a
classifier), m any other.

>>> from vmoe.classic import MixtureOfExpertsRegressor
>>> MixtureOfExpertsRegressor(n_experts=3)
MixtureOfExpertsRegressor(n_experts=3)
"""

from vmoe.classic.degenerate import DegenerateExperts
from vmoe.classic.experts.linear import Linear
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.experts.poisson import Poisson
from vmoe.classic.experts.student_t import StudentT
from vmoe.classic.flat import MixtureOfExpertsClassifier, MixtureOfExpertsRegressor
from vmoe.classic.hierarchy import HierarchicalMixtureClassifier, HierarchicalMixtureRegressor
from vmoe.classic.partition import PartitionGate
from vmoe.classic.path import MixturePath, mixture_path
from vmoe.classic.plot import plot_tree
from vmoe.classic.scoring import LogLikelihoodScorer

__all__ = [
    "DegenerateExperts",
    "HierarchicalMixtureClassifier",
    "HierarchicalMixtureRegressor",
    "Linear",
    "LogLikelihoodScorer",
    "Logistic",
    "MixtureOfExpertsClassifier",
    "MixtureOfExpertsRegressor",
    "MixturePath",
    "PartitionGate",
    "Poisson",
    "StudentT",
    "mixture_path",
    "plot_tree",
]
