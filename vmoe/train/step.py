"""One training step: a pure function of the state and a batch."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from vmoe import models
from vmoe.analysis.measures import block_measures, dropped_and_unprocessed, expert_totals
from vmoe.config import TrainConfig
from vmoe.data.pipeline import Batch
from vmoe.nn.losses import cross_entropy
from vmoe.nn.parts import norms_by_part
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.lr_factors import Params, replace_trained, trained_params
from vmoe.train.optim import optimizer, schedule, update_ema
from vmoe.train.state import State, abstract_state, state_shardings

Metrics = dict[str, Any]


def train_step(
    state: State, batch: Batch, *, config: TrainConfig, placement: Placement = ONE_DEVICE
) -> tuple[State, Metrics]:
    """Forward, backward and update.

    All randomness (router noise, dropout, random priority) is determined by the config's seed and
    the number of the batch.

    Returns:
        the next state, and scalars: ``loss`` (nats), ``accuracy``, ``aux_loss``, ``dropped`` (share
        of the choices), ``unprocessed`` (share of the tokens), ``lr``, ``gradient_norm``;
        ``blocks``, the measures of each sparse block; ``norms`` of parameters, gradients and
        updates by part of the model. Frozen parts have no gradients and no updates.
    """
    key = jax.random.fold_in(jax.random.key(config.seed), state.batch)
    trained = trained_params(config.optim, state.params)
    gradient, metrics = jax.grad(_loss, has_aux=True)(
        trained, state.params, batch, key, config=config, placement=placement
    )
    updates, opt_state = optimizer(config).update(gradient, state.opt_state, trained)
    trained = cast(Params, optax.apply_updates(trained, updates))
    params, ema = replace_trained(state.params, trained), state.ema
    if ema is not None:
        ema = update_ema(config, ema, trained, state.step)
    metrics |= {
        "lr": schedule(config.optim, config.steps)(state.step),
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

    The state passed in is donated: its memory is reused for the next one.
    """

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        return train_step(state, batch, config=config, placement=placement)

    if placement.mesh is None:
        return jax.jit(step, donate_argnums=0)
    shardings = state_shardings(abstract_state(config), placement)
    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))


def _loss(
    trained: Params,
    params: Params,
    batch: Batch,
    key: jax.Array,
    *,
    config: TrainConfig,
    placement: Placement,
) -> tuple[jax.Array, Metrics]:
    """The cross-entropy plus the weighted auxiliary losses of all sparse blocks.

    Args:
        trained: the parameters to differentiate by; they replace those in ``params``.
    """
    params = replace_trained(params, trained)
    model = models.with_params(config.model, params, placement=placement)
    logits, records = model.forward(batch.images, train=True, key=key)
    labels = optax.smooth_labels(batch.labels, config.label_smoothing)
    loss = cross_entropy(logits, labels, config.loss).mean()
    aux_loss = sum((record.aux_loss for record in records.values()), jnp.zeros(()))
    correct = logits.argmax(-1) == batch.labels.argmax(-1)
    totals = {block: expert_totals(record) for block, record in records.items()}
    dropped, unprocessed = dropped_and_unprocessed(totals.values())
    metrics = {
        "loss": loss,
        "accuracy": correct.mean(),
        "aux_loss": aux_loss,
        "dropped": dropped,
        "unprocessed": unprocessed,
        "blocks": {block: block_measures(sums) for block, sums in totals.items()},
    }
    return loss + aux_loss, metrics
