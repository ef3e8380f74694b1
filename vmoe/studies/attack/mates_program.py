"""The compiled programs that predict victims in groups, and change the pixels of their mates.

Slots, priority and the victim's index are traced, so the programs serve all settings with groups of
one size.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from vmoe import models
from vmoe.analysis.interventions import limited
from vmoe.axes import Record
from vmoe.config import MoEConfig, RoutingOverrides, replace
from vmoe.nn.vit import ViT
from vmoe.routing.groups import by_image
from vmoe.routing.priority import PRIORITIES
from vmoe.studies.attack.config import AttackConfig
from vmoe.studies.attack.images import label_loss, routing_of, sign_steps


class GroupRouting(NamedTuple):
    """The traced settings of groups of m images, one of which is a victim.

    Attributes:
        slots: slots per expert and group, by block.
        priorities: the number of the priority, by block.
        victim: True at the victim's index in a group.
    """

    slots: dict[int, Int[Array, ""]]
    priorities: dict[int, Int[Array, ""]]
    victim: Bool[Array, "x"]


class Outcome(NamedTuple):
    """Results for victims in one group each, or in several.

    Attributes:
        losses: softmax cross-entropy in nats.
        predictions: the class with the largest logit.
        dropped: fraction of the victim's choices, in all sparse blocks, that got no slot.
    """

    losses: Float[np.ndarray, "b *x"]
    predictions: Int[np.ndarray, "b *x"]
    dropped: Float[np.ndarray, "b *x"]


def with_room(
    model: ViT, setting: RoutingOverrides, n: int, place: int
) -> tuple[ViT, GroupRouting]:
    """The model with slots for all tokens of a group, and the traced settings to call it with.

    Args:
        n: tokens per image.
        place: index of the victim in a group.
    """
    layers = setting.apply(model.config).moe_blocks
    slots = {i: moe.slots(n * moe.router.images_per_group) for i, moe in layers.items()}
    numbers = {
        i: PRIORITIES.index(moe.router.priority)  # check_mates excludes others
        for i, moe in layers.items()
    }
    size = next(iter(model.config.moe_blocks.values())).router.images_per_group
    traced, priorities = jax.tree.map(jnp.int32, (slots, numbers))
    routing = GroupRouting(traced, priorities, jnp.arange(size) == place)
    roomy = dataclasses.replace(setting, priority=None).apply(model.config)

    def widened(moe: MoEConfig) -> MoEConfig:  # the same for every capacity, to be compiled once
        most = n * moe.router.images_per_group
        return replace(
            moe, router=replace(moe.router.with_slots(capacity=most), capacity_factor=1.0)
        )

    roomy = roomy.with_layers(widened)
    return models.with_params(roomy, models.params_of(model)), routing


def _forward(
    model: ViT, routing: GroupRouting, groups: jax.Array, valid: jax.Array
) -> tuple[jax.Array, dict[int, Record]]:
    """The logits (g, m, y) and the records."""
    g, m = groups.shape[:2]
    decide = {i: limited(slots, routing.priorities[i]) for i, slots in routing.slots.items()}
    logits, records = model.forward(
        groups.reshape(g * m, *groups.shape[2:]), valid=jnp.tile(valid, g), decide=decide
    )
    return logits.reshape(g, m, -1), records


@models.compiled
def predict_victims(
    model: ViT,
    routing: GroupRouting,
    groups: Float[Array, "g x h w 3"],
    labels: Int[Array, "g l"],
    mates: Bool[Array, ""],
) -> tuple[Array, ...]:
    """The fields of ``Outcome``, for one group per victim.

    Args:
        model: the model of ``with_room``.
        labels: the classes of each victim; padded with -1.
        mates: False to leave the mates out, with the same slots.
    """
    valid = routing.victim | mates
    logits, records = _forward(model, routing, groups, valid)
    place = routing.victim.argmax()
    own = logits[:, place]
    dropped = [
        _by_image(routing_of(record).dropped, *groups.shape[:2])[:, place].mean((1, 2))
        for record in records.values()
    ]
    return label_loss(own, labels), own.argmax(-1), jnp.stack(dropped).mean(0)


@models.compiled
def climb(
    model: ViT,
    config: AttackConfig,
    routing: GroupRouting,
    groups: Float[Array, "g x h w 3"],
    largest: Float[Array, ""],
) -> tuple[Float[Array, "g x h w 3"], Float[Array, "g 2"]]:
    """The groups with mates that maximize the surrogate, and the surrogate before and after.

    Args:
        model: the model of ``with_room``.
        config: only ``steps`` and ``project`` are used.
        largest: the largest change, in units of the images.
    """
    everyone = jnp.ones(groups.shape[1], bool)

    def value(groups: jax.Array) -> jax.Array:
        _, records = _forward(model, routing, groups, everyone)
        return surrogate(records, routing.slots, routing.victim, groups.shape[0])

    def direction(groups: jax.Array) -> jax.Array:
        gradient = jax.grad(lambda groups: value(groups).sum())(groups)
        return jnp.where(routing.victim[:, None, None, None], 0.0, gradient)

    changed = sign_steps(direction, groups, config, largest)
    return changed, jnp.stack([value(groups), value(changed)], -1)


def surrogate(
    records: dict[int, Record],
    slots: dict[int, Int[Array, ""]],
    victim: Bool[Array, "_"],
    g: int,
) -> Float[Array, "g"]:
    """The fraction of the victim's choices whose experts the mates fill, for each of g groups.

    It is differentiable: an expert is filled by the sum of the mates' gates over its slots, at most
    1. Pixels then change only for experts of the victim that are not full yet, and a larger gate
    also means a higher priority. The result is the mean over sparse blocks, in [0, 1].

    Args:
        slots: slots per expert in a group of this size.
        victim: True at the victim's index in a group.
    """
    fractions = []
    for i, record in records.items():
        gates = _by_image(record.gates, g, len(victim))
        filled = jnp.where(victim[:, None, None], 0.0, gates).sum((1, 2)) / slots[i]
        chosen = _by_image(routing_of(record).experts, g, len(victim))[:, victim.argmax()]
        share = jax.nn.one_hot(chosen, gates.shape[-1]).mean((1, 2))
        fractions.append((share * jnp.minimum(filled, 1.0)).sum(-1))
    return jnp.stack(fractions).mean(0)


def _by_image(groups: jax.Array, g: int, m: int) -> jax.Array:
    """Reshapes an array (groups, tokens, x) with the layer's groups to (g, m, n, x)."""
    images = by_image(groups, g * m)
    return images.reshape(g, m, *images.shape[1:])
