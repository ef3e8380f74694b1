"""State of routers that is not a parameter, such as a bias that balances the load.

No gradient reaches it. It changes after each step of training, by sums over all devices, and is
constant in evaluation. It is stored with the parameters, as ``state`` of its layer.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import get_abstract_mesh

from vmoe.axes import Record
from vmoe.config import ViTConfig
from vmoe.routing.load import expert_totals
from vmoe.routing.router import AnyRouter, State
from vmoe.trees import merged


class RouterState(nnx.Variable):
    """A variable of a router's state."""


def next_state(router: AnyRouter, state: State, totals: Mapping[str, Any]) -> State:
    """The state of one router after a step of training; as it was after one without tokens.

    Args:
        totals: the ``expert_totals`` of the batch; in a ``jax.shard_map``, those of each device,
            which are added up over all its axes.
    """
    sums = {name: totals[name] for name in ("choices", "tokens")} | totals["sums"]
    if axes := get_abstract_mesh().manual_axes:
        sums = jax.lax.psum(sums, axes)
    new = router.next_state(state, sums)
    return {name: jnp.where(sums["tokens"] > 0, x, state[name]) for name, x in new.items()}


def next_states(
    config: ViTConfig, params: dict[Any, Any], totals: Mapping[int, Mapping[str, Any]]
) -> dict[Any, Any]:
    """The states of all routers after a step of training, by their paths in the parameters.

    Args:
        params: as ``models.params_of`` returns them.
        totals: the ``expert_totals`` of the batch, by sparse block.
    """
    flat, states = flatten_dict(params), {}
    for block, moe in config.moe_blocks.items():
        path = ("blocks", block, "mlp", "state")
        state = {key[-1]: x for key, x in flat.items() if key[: len(path)] == path}
        if state:
            new = next_state(moe.router, state, totals[block])
            states |= {(*path, name): x for name, x in new.items()}
    return unflatten_dict(states)


def with_next_states(
    config: ViTConfig,
    params: dict[Any, Any],
    before: dict[Any, Any],
    records: Mapping[int, Record],
) -> dict[Any, Any]:
    """The parameters after a step of a training loop of your own, with the routers' next states.

    Args:
        params: the parameters after the update of the optimizer, which knows no states and may
            have decayed them.
        before: the parameters before the step.
        records: the routing of the batch by sparse block, as ``ViT.forward`` returned it.
    """
    totals = {block: expert_totals(record) for block, record in records.items()}
    return merged(params, next_states(config, before, totals))
