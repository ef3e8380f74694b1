"""Routing: from router logits to decisions, without parameters.

A router is a class in a file here, see ``AnyRouter``: it is written as one of yours would be.
"""

from vmoe.routing.aux_losses import AuxLossWeights
from vmoe.routing.bias_balanced import BiasBalanced
from vmoe.routing.by_task import ByTask
from vmoe.routing.expert_choice import ExpertChoice
from vmoe.routing.expert_race import ExpertRace
from vmoe.routing.gshard import GShard
from vmoe.routing.hashed import Hash
from vmoe.routing.random import Random
from vmoe.routing.relu import ReLU
from vmoe.routing.router import AnyRouter, Router
from vmoe.routing.sinkhorn import Sinkhorn
from vmoe.routing.soft import Soft
from vmoe.routing.switch import Switch
from vmoe.routing.token_choice import TokenChoice
from vmoe.routing.top_p import TopP
from vmoe.routing.transport import Transport, TransportExpertChoice

__all__ = [
    "AnyRouter",
    "AuxLossWeights",
    "BiasBalanced",
    "ByTask",
    "ExpertChoice",
    "ExpertRace",
    "GShard",
    "Hash",
    "Random",
    "ReLU",
    "Router",
    "Sinkhorn",
    "Soft",
    "Switch",
    "TokenChoice",
    "TopP",
    "Transport",
    "TransportExpertChoice",
]
