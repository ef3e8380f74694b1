"""One step of training: a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.typing import ArrayLike
from jaxtyping import Bool

from vmoe import models
from vmoe.analysis import capture
from vmoe.analysis.measures import block_measures, choices_and_drops
from vmoe.config import TrainConfig
from vmoe.data.pipeline import Batch
from vmoe.nn.losses import cross_entropy
from vmoe.nn.parts import norms_by_part
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.optim import average, optimizer, schedule
from vmoe.train.state import Params, State

Metrics = dict[str, Any]


NOBODY = np.zeros(1, bool)  # is asked to stop


class Program(NamedTuple):
    """What a config compiles to: the first state, and the step.

    The step takes a state, a batch and, of each device, whether its process is asked to stop;
    ``stop`` among its metrics is whether any is, so that all stop after the same step.
    """

    init: Callable[[], State]
    step: jax.stages.Wrapped  # (State, Batch, Bool[Array, "x"]) -> tuple[State, Metrics]
    like: State
    """The state's shapes, each with where it lies."""


def compile_program(config: TrainConfig, placement: Placement = ONE_DEVICE) -> Program:
    """The functions of a run; ``step`` gives its state's memory to the next one."""
    optim = optimizer(config.optim, config.steps)
    rate = schedule(config.optim, config.steps)

    def init() -> State:
        model = models.build(config.model, seed=config.seed)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        ema = jax.tree.map(jnp.copy, params) if config.ema_decay else None
        step, batch, rewinds = (jnp.zeros((), jnp.int32) for _ in range(3))
        return State(step, batch, rewinds, params, optim.init(params), ema)

    def loss(params: Params, batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        model = models.with_params(config.model, params, placement=placement)
        logits, records = capture(model, batch.images, train=True, key=key)
        labels = optax.smooth_labels(batch.labels, config.label_smoothing)
        main = cross_entropy(logits, labels, config.loss).mean()
        balance = sum((record.aux_loss for record in records.values()), jnp.zeros(()))
        correct = logits.argmax(-1) == batch.labels.argmax(-1)
        made, dropped = choices_and_drops(records)
        metrics = {
            "loss": main,
            "accuracy": correct.mean(),
            "aux_loss": balance,
            "dropped": dropped / jnp.maximum(made, 1),
            "blocks": {block: block_measures(record) for block, record in records.items()},
        }
        return main + balance, metrics

    def step(
        state: State,
        batch: Batch,
        asked: Bool[ArrayLike, "x"] = NOBODY,
    ) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.batch)
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, batch, key)
        updates, moments = optim.update(gradient, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = (
            None if state.ema is None else average(state.ema, params, config.ema_decay, state.step)
        )
        norm = optax.tree.norm(gradient)
        metrics |= {
            "lr": rate(state.step),
            "stop": jnp.any(asked),
            "gradient_norm": norm,
            "finite": jnp.isfinite(metrics["loss"] + metrics["aux_loss"] + norm),
            "norms": {
                "parameters": norms_by_part(params),
                "gradients": norms_by_part(gradient),
                "updates": norms_by_part(updates),
            },
        }
        after = State(state.step + 1, state.batch + 1, state.rewinds, params, moments, ema)
        return after, placement.replicate(metrics)

    shapes = jax.eval_shape(init)
    if placement.mesh is None:
        return Program(init, jax.jit(step, donate_argnums=0), shapes)
    where = _lies(shapes, placement)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes, where
    )
    return Program(
        jax.jit(init, out_shardings=where),
        jax.jit(step, donate_argnums=0, out_shardings=(where, None)),
        like,
    )


def _lies(state: State, placement: Placement) -> State:
    """Where each array of a state lies."""
    counts = (placement.replicated(),) * 3
    params, moments = placement.params(state.params), placement.opt_state(state.moments)
    return State(*counts, params, moments, None if state.ema is None else params)
