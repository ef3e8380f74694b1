"""What copies of hot experts would save, by the load that a run has measured."""

import csv
import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Float

from vmoe.config import TrainConfig
from vmoe.errors import UsageError, reading, require
from vmoe.nn.patches import num_tokens
from vmoe.sharding import Placement
from vmoe.train.state import abstract_state

TRIED = (0, 1, 2, 4)
"""Numbers of hot experts."""

Load = Float[np.ndarray, "e"]
"""Each expert's share of the choices of a layer."""


@dataclasses.dataclass(frozen=True)
class Hot:
    """A number of hot experts, and what it changes, if all devices have alike tokens.

    Attributes:
        experts: ``MoEConfig.hot_experts``.
        busiest: rows that the busiest device computes, in even shares; a mean over the layers.
        factor: the smallest ``MoEConfig.ragged_buffer_factor`` that drops no choice in any layer.
        rows_sent: bytes of rows that a device sends to others in a step, without gaps.
        buffers_sent: the same in buffers of this factor.
        copies_sent: bytes that a device sends to others for the parameters of copies and their
            gradients.
    """

    experts: int
    busiest: float
    factor: float
    rows_sent: float
    buffers_sent: float
    copies_sent: float


def read_load(path: Path) -> dict[int, Load]:
    """The load of each block at the last step in an experts.csv.

    Raises:
        UsageError: it is no such file, or cannot be read.
    """
    blocks: dict[int, dict[int, float]] = {}
    last = ""
    with reading(path), path.open(newline="", encoding="utf-8") as file:
        try:
            for row in csv.DictReader(file):
                if row["step"] != last:
                    last, blocks = row["step"], {}
                blocks.setdefault(int(row["block"]), {})[int(row["expert"])] = float(row["load"])
        except (KeyError, TypeError, ValueError):
            raise UsageError("give the experts.csv of a run", load=path) from None
    if not blocks:
        raise UsageError("it has no rows yet, give the experts.csv of a run", load=path)
    return {block: np.array([load[e] for e in sorted(load)]) for block, load in blocks.items()}


def hot_experts(config: TrainConfig, placement: Placement, load: Mapping[int, Load]) -> list[Hot]:
    """What each number of hot experts would change.

    Args:
        load: by block.

    Raises:
        UsageError: no layer without a capacity sends rows, experts are not split, or the load is of
            another model.
    """
    model, state = config.model, abstract_state(config)
    # With a capacity, a load before choices are dropped does not say what is sent.
    whole = model.depth - model.class_token_last  # blocks for all tokens
    layers = {
        i: moe
        for i, moe in model.moe_blocks.items()
        if moe.sends_rows and moe.router.dropless and i < whole
    }
    if not layers:
        raise UsageError(
            "no layer without a capacity sends rows of all tokens, so there is nothing to copy: "
            "leave the load out"
        )
    alone = "it splits no experts, so none is copied: use another, or leave the load out"
    require(placement.expert > 1, alone, mesh=str(placement))
    for block, moe in layers.items():
        if (found := len(load.get(block, ()))) != moe.num_experts:
            problem = f"block {block} has {moe.num_experts} experts here: use a run of this model"
            raise UsageError(problem, load=f"{found} experts")

    others = (placement.expert - 1) / placement.expert
    levels = placement.hosts, placement.expert // placement.hosts
    sends = sum((n - 1) / n for n in levels)  # the same in one level
    tokens = config.batch_size // placement.devices * num_tokens(model)
    passes = 6 if model.remat else 4  # there and back, and so do gradients
    most, result = min(moe.num_experts for moe in layers.values()), []
    for h in (h for h in TRIED if h <= most):
        busiest, factors, rows, buffers, copies = [], [], [], [], []
        for block, moe in layers.items():
            hot = np.argsort(-load[block], kind="stable")[:h]
            cold = load[block].copy()
            cold[hot] = 0.0
            factors.append(placement.expert * cold.reshape(placement.expert, -1).sum(1).max())
            busiest.append(factors[-1] + load[block][hot].sum())
            itemsize = 2 if "bfloat16" in (moe.transfer_dtype, model.dtype) else 4
            buffers.append(tokens * moe.router.k * model.width * itemsize * passes * sends)
            rows.append(buffers[-1] * cold.sum())
            parameters = jax.tree.leaves(state.params["blocks"][block]["mlp"]["experts"])
            size = sum(math.prod(x.shape) for x in parameters) // moe.num_experts
            # Float32; an all-reduce goes around a ring twice, forward and backward.
            copies.append(4 * h * size * passes * others * config.accumulate)
        factor = float(max(factors))
        sent = (float(sum(rows)), factor * float(sum(buffers)), float(sum(copies)))
        result.append(Hot(h, float(np.mean(busiest)), factor, *sent))
    return result
