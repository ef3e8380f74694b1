"""The training state, its shardings, and its items in a checkpoint."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from vmoe import models
from vmoe.config import TrainConfig
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.lr_factors import Params, trained_params
from vmoe.train.optim import optimizer


class State(NamedTuple):
    """Everything that training changes.

    Attributes:
        step: number of steps taken.
        batch: number of the next batch: the step, plus the batches skipped after a NaN.
        rewinds: number of times the run went back after a NaN.
        params: the model's parameters, as nested dicts.
        opt_state: the optimizer's state for the trained parameters.
        ema: moving average of the parameters; None if the config has none.
    """

    step: Int[Array, ""]
    batch: Int[Array, ""]
    rewinds: Int[Array, ""]
    params: Params
    opt_state: Any
    ema: Params | None


def init_state(config: TrainConfig, placement: Placement = ONE_DEVICE) -> State:
    """The state before the first step, determined by the config and its seed.

    On one device it is committed to it, as a restored state is, so that the same compiled step
    takes both.
    """
    if placement.mesh is None:
        params = jax.block_until_ready(_init_params(config))  # raises if memory is too small
        params = jax.device_put(params, jax.local_devices()[0])
        return jax.jit(functools.partial(_first_state, config))(params)
    shardings = state_shardings(_shapes(config), placement)
    return jax.jit(lambda: _first_state(config, _init_params(config)), out_shardings=shardings)()


def abstract_state(config: TrainConfig, placement: Placement = ONE_DEVICE) -> State:
    """The shapes and dtypes of the state; on a mesh with their shardings. Allocates nothing."""
    shapes = _shapes(config)
    if placement.mesh is None:
        return shapes
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(shapes, placement),
    )


def state_shardings(state: State, placement: Placement) -> State:
    """A state whose leaves are the shardings of its arrays."""
    params, opt_state = placement.params(state.params), placement.opt_state(state.opt_state)
    counts: Any = placement.replicated()
    ema = None if state.ema is None else params
    return State(counts, counts, counts, params, opt_state, ema)


def checkpoint_items(state: State) -> dict[str, Any]:
    """The state as the items of a checkpoint; see ``vmoe/checkpoints/run.py``."""
    training = (state.step, state.batch, state.rewinds, state.opt_state)
    ema = {} if state.ema is None else {"ema": state.ema}
    return {"params": state.params, "training": training, **ema}


def from_checkpoint_items(items: dict[str, Any]) -> State:
    """The state from the items of a checkpoint; the inverse of ``checkpoint_items``."""
    step, batch, rewinds, opt_state = items["training"]
    return State(step, batch, rewinds, items["params"], opt_state, items.get("ema"))


@functools.lru_cache(maxsize=4)
def _shapes(config: TrainConfig) -> State:
    """Shapes of the state; cached, since tracing the initialization takes a second."""
    params = models.params_of(models.build_abstract(config.model))
    return jax.eval_shape(lambda params: _first_state(config, params), params)


def _init_params(config: TrainConfig) -> Params:
    return models.params_of(models.build(config.model, seed=config.seed))


def _first_state(config: TrainConfig, params: Params) -> State:
    ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
    step, batch, rewinds = (jnp.zeros((), jnp.int32) for _ in range(3))
    opt_state = optimizer(config).init(trained_params(config.optim, params))
    return State(step, batch, rewinds, params, opt_state, ema)
