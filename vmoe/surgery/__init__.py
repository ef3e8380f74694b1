"""Surgery: turns one model into another. It works on models and parameter trees, not on files.

``resize`` fits parameters to another config, ``upcycle`` makes a dense model sparse, ``experts``
changes the experts of a sparse one, and ``moefy`` makes any Flax NNX model sparse.

``Copies``, ``Noise``, ``Drop``, ``Split``, ``Clusters`` and ``LowRank`` are the starts of
``upcycle``.
"""

from vmoe.surgery.moefy import moefy
from vmoe.surgery.resize import Changes, fit
from vmoe.surgery.starts import Clusters, Copies, Drop, LowRank, Noise, Split
from vmoe.surgery.upcycle import upcycle

__all__ = [
    "Changes",
    "Clusters",
    "Copies",
    "Drop",
    "LowRank",
    "Noise",
    "Split",
    "fit",
    "moefy",
    "upcycle",
]
