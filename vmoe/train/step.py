"""One training step: a pure function of the state and a batch."""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float32, Int, Key

from vmoe import models
from vmoe.config import TrainConfig, replace
from vmoe.config.changes import MAY_CHANGE
from vmoe.data.pipeline import Batch
from vmoe.nn.inputs import has_label, is_label, label_vectors, to_float
from vmoe.nn.losses import cross_entropy
from vmoe.nn.parts import norms_by_part
from vmoe.nn.router_state import next_states
from vmoe.routing.load import block_measures, dropped_and_unprocessed, expert_totals
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.accumulate import Gradient, Metrics, Totals, over_parts
from vmoe.train.lr_factors import Params, trained_params
from vmoe.train.mixing import mix
from vmoe.train.optim import optimizer, schedule, update_ema
from vmoe.train.state import State, abstract_state, state_shardings
from vmoe.trees import merged

OF_NO_STEP = {
    each.name: each.default
    for each in dataclasses.fields(TrainConfig)
    if MAY_CHANGE.get(each.name) == ""
}
"""Fields of a config that decide nothing in a step, with their defaults: intervals and sets."""
MIXING = 1 << 20  # number of the key of mixup and CutMix; the model's are smaller


class Inputs(NamedTuple):
    """The inputs of the model and the loss for a batch.

    Attributes:
        images: in [-1, 1]; mixed if the config has mixing.
        targets: a probability for each class; mixed as the images are. For the softmax loss, the
            targets of an image with labels sum to 1.
        labels: classes before mixing; padded with -1.
    """

    images: Float32[Array, "b h w 3"]
    targets: Float32[Array, "b y"]
    labels: Int[Array, "b l"]


def train_step(
    state: State, batch: Batch, *, config: TrainConfig, placement: Placement = ONE_DEVICE
) -> tuple[State, Metrics]:
    """Forward, backward and update.

    All randomness (mixing, router noise, dropout, random priority) is determined by the config's
    seed, the number of the batch and, with ``accumulate``, the number of the part.

    Returns:
        the next state, and scalars: ``loss`` (in nats), ``accuracy`` (of the images with labels),
        ``aux_loss``, ``dropped`` (share of the choices), ``unprocessed`` (share of the tokens
        without a routed expert), ``lr`` and ``gradient_norm``; ``blocks``, the measures of each
        sparse block; and ``norms`` of parameters, gradients and updates, by part of the model.
        Frozen parts have no gradients and no updates. The softmax loss is averaged over the images
        with labels, as in an evaluation, but its gradient over the whole batch.
    """
    key = step_key(config, state.batch)
    trained = trained_params(config.optim, state.params)

    def gradient_of(inputs: Inputs, key: jax.Array) -> Gradient:
        return jax.grad(_loss, has_aux=True)(
            trained, state.params, inputs, key, config=config, placement=placement
        )

    inputs = make_inputs(batch, key, config, placement)
    labeled = has_label(inputs.labels)
    gradient, (metrics, totals) = over_parts(
        gradient_of, inputs, key, parts=config.accumulate, placement=placement
    )
    updates, opt_state = optimizer(config).update(gradient, state.opt_state, trained)
    trained = cast(Params, optax.apply_updates(trained, updates))
    params, ema = merged(state.params, trained), state.ema
    if ema is not None:
        ema = update_ema(config, ema, trained, state.step)
    routers_train = config.optim.lr_factors.routers > 0  # a frozen router keeps its state
    states = next_states(config.model, params, totals) if routers_train else {}
    params = merged(params, states)
    ema = None if ema is None else merged(ema, states)
    dropped, unprocessed = dropped_and_unprocessed(totals.values())
    per_labeled = len(labeled) / jnp.maximum(labeled.sum(), 1)
    if config.loss == "softmax":  # an image without labels has none
        metrics["loss"] *= per_labeled
    metrics |= {
        "accuracy": metrics["accuracy"] * per_labeled,
        "dropped": dropped,
        "unprocessed": unprocessed,
        "blocks": {block: block_measures(sums) for block, sums in totals.items()},
        "lr": schedule(config.optim, config.total_steps)(state.step),
        "gradient_norm": optax.tree.norm(gradient),
        "norms": {
            "parameters": norms_by_part(params),
            "gradients": norms_by_part(gradient),
            "updates": norms_by_part(updates),
        },
    }
    new_state = State(state.step + 1, state.batch + 1, state.rewinds, params, opt_state, ema)
    return new_state, placement.replicate(metrics)


def make_train_step(config: TrainConfig, placement: Placement = ONE_DEVICE) -> jax.stages.Wrapped:
    """``train_step`` of a config, jitted: (state, batch) -> (state, metrics).

    The state passed in is donated: its memory is reused for the next one. Cached, so that a run
    that is resumed in the same process compiles nothing again, also with other intervals and sets.
    """
    return _make_train_step(replace(config, **OF_NO_STEP), placement)


@functools.lru_cache(maxsize=4)
def _make_train_step(config: TrainConfig, placement: Placement) -> jax.stages.Wrapped:
    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        return train_step(state, batch, config=config, placement=placement)

    if placement.mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = state_shardings(abstract_state(config), placement)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def step_key(config: TrainConfig, batch: Int[Array, ""] | int) -> Key[Array, ""]:
    """The source of all randomness of a step.

    Args:
        batch: number of its batch.
    """
    return jax.random.fold_in(jax.random.key(config.seed), batch)


def make_inputs(
    batch: Batch, key: Key[Array, ""], config: TrainConfig, placement: Placement = ONE_DEVICE
) -> Inputs:
    """Converts pixels to floats and classes to targets, smooths the targets, and mixes both.

    The targets of an image without labels stay zeros.

    Args:
        key: random key of the step.
    """
    images = to_float(jnp.asarray(batch.images))
    normalize = config.loss == "softmax"
    targets = label_vectors(batch.labels, config.model.num_classes, normalize=normalize)
    labeled = has_label(jnp.asarray(batch.labels))
    targets = jnp.where(
        labeled[:, None], optax.smooth_labels(targets, config.label_smoothing), targets
    )
    key = jax.random.fold_in(key, MIXING)
    mixed = mix(images, targets, key, config.data, placement.devices, placement.replicate)
    return Inputs(*mixed, jnp.asarray(batch.labels))


def _loss(
    trained: Params,
    params: Params,
    inputs: Inputs,
    key: jax.Array,
    *,
    config: TrainConfig,
    placement: Placement,
) -> tuple[jax.Array, tuple[Metrics, Totals]]:
    """The cross-entropy plus the weighted auxiliary losses of all sparse blocks, and metrics.

    Args:
        trained: the parameters to differentiate by; they replace their values in ``params``.
    """
    params = merged(params, trained)
    model = models.with_params(config.model, params, placement=placement)
    logits, records = model.forward(inputs.images, train=True, key=key)
    loss = cross_entropy(logits, inputs.targets, config.loss).mean()
    aux_loss = sum((record.aux_loss for record in records.values()), jnp.zeros(()))
    correct = is_label(logits.argmax(-1), inputs.labels)
    metrics = {"loss": loss, "accuracy": correct.mean(), "aux_loss": aux_loss}
    totals = {block: expert_totals(record) for block, record in records.items()}
    return loss + aux_loss, (metrics, totals)
