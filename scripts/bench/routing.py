"""Measure the routing of vmoe, compared with routing by one-hot cumulative sums."""

import argparse
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scripts.bench.measure import Row, compiled, rows_of
from vmoe.config import MoEConfig
from vmoe.routing import queues, token_choice
from vmoe.routing.priority import priority_order
from vmoe.routing.top_k import top_k


def assign_by_cumulative_sum(
    gates: jax.Array, k: int, c: int, bpr: bool, top_k: Callable[..., Any]
) -> tuple[jax.Array, jax.Array]:
    """The experts and queue positions of one group's choices, by one-hot cumulative sums."""
    top, experts = top_k(gates, k)
    order = jnp.argsort(-top[:, 0], stable=True) if bpr else jnp.arange(len(gates))
    hot = jax.nn.one_hot(experts[order].T.reshape(-1), gates.shape[1], dtype=jnp.int32)
    position = ((jnp.cumsum(hot, axis=0) - 1) * hot).sum(-1).reshape(k, -1).T
    position = jnp.zeros_like(position).at[order].set(position)
    return experts, jnp.where(position < c, position, -1)


def routing(options: argparse.Namespace) -> list[Row]:
    rows = []
    for e in options.experts:
        s = options.tokens
        gates = jax.nn.softmax(jax.random.normal(jax.random.key(e), (1, s, e)), axis=-1)
        config = MoEConfig(num_experts=e)
        c = config.slots(s)
        assign = functools.partial(token_choice.assign, k=2, c=c, priority="largest_gate")
        ours = compiled(assign, gates, jnp.ones((1, s), bool))
        alone = compiled(lambda gates: top_k(gates, 2), gates)
        after = compiled(functools.partial(after_top_k, e=e, c=c), *top_k(gates, 2))
        by_cumulative_sum, with_our_top_k = (
            compiled(
                functools.partial(assign_by_cumulative_sum, k=2, c=c, bpr=True, top_k=f), gates[0]
            )
            for f in (jax.lax.top_k, top_k)
        )
        assigned, (experts, position) = ours.run(), by_cumulative_sum.run()
        slots = jnp.where(position >= 0, experts * c + position, e * c)
        assert (assigned.slots[0] == slots).all(), "the assignments differ"
        programs = {
            "top-k alone": alone,
            "vmoe": ours,
            "vmoe after top-k": after,
            "by cumulative sum": by_cumulative_sum,
            "by cumulative sum, vmoe's top-k": with_our_top_k,
        }
        target = {32: "6", 128: "20", 512: "50"}.get(e, "")
        ratios = {
            "by cumulative sum": [("vmoe", target and f">= {target}")],
            "by cumulative sum, vmoe's top-k": [("vmoe", "")],
        }
        rows += rows_of("routing", {"e": e, "tokens": s}, programs, options.repeats, ratios)
    return rows


def after_top_k(top_gates: jax.Array, experts: jax.Array, *, e: int, c: int) -> Any:
    order = priority_order(top_gates, "largest_gate", None)
    return queues.queue(experts, order, e=e, c=c)
