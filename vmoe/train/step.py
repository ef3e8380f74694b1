"""One step of training: a pure function of the state and a batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from vmoe import models
from vmoe.analysis import capture
from vmoe.analysis.measures import choices_and_drops
from vmoe.config import Train
from vmoe.data.pipeline import Batch
from vmoe.nn.vit import ViT
from vmoe.train.optim import optimizer, schedule

Metrics = dict[str, Float[Array, ""]]


class State(NamedTuple):
    """All that training changes.

    Attributes:
        step: how many steps have been taken.
        params: the model's parameters, as nested dicts.
        moments: the optimiser's state.
    """

    step: Int[Array, ""]
    params: dict[str, Any]
    moments: Any


class Program(NamedTuple):
    """What a config compiles to: the first state, the step, and the model of a state."""

    init: Callable[[], State]
    step: Callable[[State, Batch], tuple[State, Metrics]]
    model: Callable[[State], ViT]


def compile_program(config: Train) -> Program:
    """The functions of a run; ``step`` gives its state's memory to the next one."""
    optim = optimizer(config.optim, config.steps)
    rate = schedule(config.optim, config.steps)

    def init() -> State:
        model = models.build(config.model, seed=config.seed)
        params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        return State(jnp.zeros((), jnp.int32), params, optim.init(params))

    def model_of(params: dict[str, Any]) -> ViT:
        return models.with_params(config.model, params)

    def loss(params: dict[str, Any], batch: Batch, key: jax.Array) -> tuple[jax.Array, Metrics]:
        logits, records = capture(model_of(params), batch.images, train=True, key=key)
        labels = optax.smooth_labels(batch.labels, config.label_smoothing)
        main = optax.softmax_cross_entropy(logits, labels).mean()
        balance = sum((record.balance for record in records.values()), jnp.zeros(()))
        correct = logits.argmax(-1) == batch.labels.argmax(-1)
        metrics = {"loss": main, "balance": balance, "accuracy": correct.mean()}
        made, dropped = choices_and_drops(records)
        return main + balance, metrics | {"dropped": dropped / jnp.maximum(made, 1)}

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradient, metrics = jax.grad(loss, has_aux=True)(state.params, batch, key)
        updates, moments = optim.update(gradient, state.moments, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {"lr": rate(state.step), "gradient_norm": optax.tree.norm(gradient)}
        return State(state.step + 1, params, moments), metrics

    return Program(init, jax.jit(step, donate_argnums=0), lambda state: model_of(state.params))
