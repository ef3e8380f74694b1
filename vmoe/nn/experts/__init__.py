"""Experts of an MoE layer: from the tokens in their slots to outputs.

``StackedMlps``: MLPs whose parameters are stacked along e, with three implementations.
``Copies``: modules of equal structure, computed at once.
``MixedExperts``: experts of different kinds, computed one after another.
``experts_of`` makes the last two from a list of any modules.
"""

from vmoe.nn.experts.copies import Copies
from vmoe.nn.experts.interface import Experts, Slots, about
from vmoe.nn.experts.mixed import MixedExperts, experts_of
from vmoe.nn.experts.mlps import StackedMlps

__all__ = ["Copies", "Experts", "MixedExperts", "Slots", "StackedMlps", "about", "experts_of"]
