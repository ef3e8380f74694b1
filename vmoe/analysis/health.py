"""Whether the routing of a model is healthy: findings with a threshold and a remedy each."""

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vmoe.analysis.effects import BatchDependence
from vmoe.analysis.statistics import BlockStatistics

MIN_LOAD = 0.001
"""Smallest fraction of the choices of an expert that is in use."""
MAX_LOAD = 5.0
"""Largest load of an expert, as a multiple of the mean."""
MAX_DROPPED = 0.25
"""Largest fraction of the choices without a slot."""
MIN_ENTROPY = 0.01
"""Smallest mean entropy of the gates, as a fraction of ln e: below, the router hardly learns."""
MAX_CHANGED = 0.01
"""Largest fraction of the predictions that may depend on the other images of a batch."""


class Finding(NamedTuple):
    """Something about the routing that users should know.

    Attributes:
        kind: "dead", "collapse", "overflow", "certain", "not finite" or "batch".
        block: number of the sparse block; None if it concerns the whole model.
        value: what was measured.
        threshold: the bound that it exceeds.
        message: what it means, and a remedy.
    """

    kind: str
    block: int | None
    value: float
    threshold: float
    message: str

    def __str__(self) -> str:
        place = "" if self.block is None else f"block {self.block}: "
        return f"{self.kind}: {place}{self.message}"


def findings(
    blocks: Mapping[int, BlockStatistics], dependence: BatchDependence | None = None
) -> list[Finding]:
    """What is wrong with a model's routing on a data set; empty if nothing is.

    Args:
        blocks: the statistics of each sparse block.
        dependence: how much predictions depend on the batch, if it was measured.
    """
    found = [finding for i, block in blocks.items() for finding in _of_block(i, block)]
    if dependence is not None and dependence.changed > MAX_CHANGED:
        found.append(
            Finding(
                "batch",
                None,
                dependence.changed,
                MAX_CHANGED,
                f"{dependence.changed:.1%} of the predictions depend on the other images of the "
                "batch (at most 1%): evaluate with more capacity, dropless or one image per group",
            )
        )
    return found


def _of_block(i: int, block: BlockStatistics) -> Iterator[Finding]:
    e = len(block.gates)
    if not np.isfinite(block.gates).all():
        yield Finding(
            "not finite", i, math.nan, 0.0, "gates are NaN or infinite: load an earlier checkpoint"
        )
        return
    load = block.load if block.choices.any() else block.importance
    if rare := np.flatnonzero(load < MIN_LOAD).tolist():
        names = ", ".join(map(str, rare[:8])) + (" ..." if len(rare) > 8 else "")
        yield Finding(
            "dead",
            i,
            float(load.min()),
            MIN_LOAD,
            f"{len(rare)} of {e} experts ({names}) get less than 0.1% of the choices: prune them, "
            "or train with a larger weight of the importance and load losses",
        )
    if load.max() * e > MAX_LOAD:
        yield Finding(
            "collapse",
            i,
            float(load.max() * e),
            MAX_LOAD,
            f"expert {load.argmax()} gets {load.max() * e:.1f} times the mean load (at most 5): "
            "train with a larger weight of the importance and load losses",
        )
    if block.dropped > MAX_DROPPED:
        yield Finding(
            "overflow",
            i,
            block.dropped,
            MAX_DROPPED,
            f"{block.dropped:.0%} of the choices get no slot (at most 25%): use a larger capacity "
            "factor, or priority largest_gate, which drops the least important tokens",
        )
    entropy = block.gate_entropy / math.log(e) if e > 1 else 1.0
    if entropy < MIN_ENTROPY:
        yield Finding(
            "certain",
            i,
            entropy,
            MIN_ENTROPY,
            f"the gates' entropy is {entropy:.1%} of ln e (at least 1%), so the router hardly "
            "learns: train with the z loss or a lower learning rate",
        )
