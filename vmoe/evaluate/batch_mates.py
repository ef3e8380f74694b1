"""Batch-mates as an attack surface: what the other images of its group do to a prediction.

Under a capacity the images of a group compete for slots, so one image (the victim) can lose its
slots to the others (its mates). Who chooses the mates can search: draw many groups and keep the
worst. Or change pixels of mates: slots are piecewise constant, so no gradient leads from a mate to
the victim's prediction, and the steps climb a surrogate: how far the mates fill the experts that
the victim chose. With one image per group, or capacity for every token, mates change nothing.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vmoe import models
from vmoe.analysis.effects import PRIORITIES
from vmoe.analysis.interventions import limited
from vmoe.axes import Record, Routing
from vmoe.config import RoutingOverrides, ViTConfig, replace
from vmoe.config.attack import MatesConfig
from vmoe.config.fields import require
from vmoe.config.routers import Priority
from vmoe.evaluate.attack import PIXEL, AttackConfig, check_labels, cross_entropy, sign_steps
from vmoe.nn.vit import ViT
from vmoe.routing import slots_and_factor
from vmoe.routing.groups import ungroup


class Setting(NamedTuple):
    """The routing under which mates are tried.

    Attributes:
        capacity_factor: None for capacity for every token.
        priority: which tokens get their slots first.
        split: whether every image gets a group of its own, and so has no mates.
    """

    capacity_factor: float | None
    priority: Priority = "order"
    split: bool = False


class Outcome(NamedTuple):
    """Victims in one group each, or in several.

    Attributes:
        losses: cross-entropy in nats.
        predictions: the class with the largest logit.
        dropped: fraction of the victim's choices, in all sparse blocks, that got no slot.
    """

    losses: Float[np.ndarray, "b *x"]
    predictions: Int[np.ndarray, "b *x"]
    dropped: Float[np.ndarray, "b *x"]


class Changed(NamedTuple):
    """Victims with the mates of the first draw after their pixels were changed.

    Attributes:
        optimised: mates that climbed the surrogate.
        control: mates whose pixels were changed by as much, with random signs.
        surrogate: before and after, in [0, 1]; see ``surrogate``.
    """

    optimised: Outcome
    control: Outcome
    surrogate: Float[np.ndarray, "b 2"]


class MatesResult(NamedTuple):
    """Victims under one setting.

    Attributes:
        slots: of an expert in a group, by block.
        without: the victims without mates, with the same slots.
        drawn: with the mates of every draw.
        changed: with changed mates, for each way of changing them.
    """

    slots: dict[int, int]
    without: Outcome
    drawn: Outcome
    changed: list[Changed]


class Measures(NamedTuple):
    """Victims under one way to choose their mates; means over the victims.

    Attributes:
        accuracy: fraction of right predictions.
        changed: fraction of predictions that differ from those without mates.
        loss: cross-entropy in nats.
        dropped: fraction of the victims' choices that got no slot.
    """

    accuracy: float
    changed: float
    loss: float
    dropped: float


def measures(
    outcome: Outcome, without: Outcome, labels: Int[np.ndarray, "b"], *, worst: bool = False
) -> Measures:
    """Sums up victims in one or several groups.

    Args:
        without: the same victims without mates.
        worst: for each victim and measure its worst group, in place of the mean: right in all,
            changed in any.
    """
    losses, predictions, dropped = (x.reshape(len(labels), -1) for x in outcome)
    right = predictions == labels[:, None]
    changed = predictions != without.predictions[:, None]

    def over_groups(x: np.ndarray) -> float:
        return float((x.max(1) if worst else x.mean(1)).mean())

    accuracy = float((right.all(1) if worst else right).mean())
    return Measures(accuracy, *map(over_groups, (changed, losses, dropped)))


def settings(config: MatesConfig) -> list[Setting]:
    """Every capacity and priority, then two settings that are immune."""
    tried = [Setting(c, priority) for c in config.capacity_factor for priority in config.priority]
    first = config.priority[0]
    return [*tried, Setting(None, first), Setting(min(config.capacity_factor), first, split=True)]


def check_mates(model: ViT) -> None:
    """Checks that the images of a group can take each other's slots.

    Raises:
        UsageError: no block is sparse, a router is not token_choice, groups have one image or
            different sizes, or there are several devices.
    """
    layers = model.config.moe_blocks.values()
    require(bool(layers), "no block of this model is sparse, so no image depends on its batch")
    for kind in sorted({layer.router.kind for layer in layers if not layer.router.can_drop}):
        why = "routes each image alone" if kind == "soft" else "drops no choice that others take"
        require(False, f"router {kind} {why}: attack mates in models with token_choice only")
    sizes = sorted({layer.images_per_group for layer in layers})
    require(len(sizes) == 1, f"moe.images_per_group={sizes}: use the same in all blocks")
    require(sizes != [1], "moe.images_per_group=1: an image has no mates, so it is immune")
    require(model.placement.devices == 1, "mates on several devices: use one")


def group_size(config: ViTConfig) -> int:
    """The number of images in a group, the same in all sparse blocks."""
    return next(iter(config.moe_blocks.values())).images_per_group


def draw_groups(total: int, size: int, config: MatesConfig) -> Int[np.ndarray, "b x _"]:
    """The images of each victim's groups: the victim in its place among random other images.

    Args:
        total: number of images; the first ones are the victims.
        size: images per group.

    Raises:
        UsageError: there are too few images, or no such place.
    """
    place = _place(config, size)
    require(0 <= place < size, f"mates.place={place}: a group has places 0 to {size - 1}")
    needed = max(size, config.victims)
    require(
        total >= needed,
        f"images={total}: {config.victims} victims in groups of {size} need at least {needed}",
    )
    rng = np.random.default_rng(config.seed)
    groups = np.empty((config.victims, config.draws, size), int)
    for victim, draw in np.ndindex(groups.shape[:2]):
        others = rng.choice(total - 1, size - 1, replace=False)
        groups[victim, draw] = np.insert(others + (others >= victim), place, victim)
    return groups


def _place(config: MatesConfig, size: int) -> int:
    return size - 1 if config.place is None else config.place


def attack_mates(
    model: ViT,
    images: Float[np.ndarray, "b h w 3"],
    labels: Int[np.ndarray, "b"],
    setting: Setting,
    config: MatesConfig,
    changes: Sequence[AttackConfig] = (),
    *,
    batch_size: int = 64,
    on_step: Callable[[], None] = lambda: None,
) -> MatesResult:
    """Attacks the first images through mates that are drawn from all.

    The groups are the same under every setting; so are the compiled programs, unless groups are
    split.

    Args:
        changes: ways to change the mates of the first draw; steps are always projected.
        batch_size: images per batch, at least one group; it does not change the results.
        on_step: called after each batch; see ``num_steps``.

    Raises:
        UsageError: as for ``check_mates`` and ``draw_groups``; or a label is no class of the model.
    """
    check_mates(model)
    check_labels(model, labels)
    size = group_size(model.config)
    groups = draw_groups(len(images), size, config)
    place = _place(config, size)
    program = _Program(model, setting, images, np.arange(size) == place)
    own, first = labels[: config.victims], groups[:, 0]
    run = functools.partial(_in_batches, _groups_at_once(batch_size, size), on_step)

    def outcome(index: np.ndarray, labels: np.ndarray, mates: bool = True) -> Outcome:
        return program.outcome(images[index], labels, mates)

    drawn = run(outcome, groups.reshape(-1, size), np.repeat(own, config.draws))
    rng = np.random.default_rng(config.seed)

    def changed(index: np.ndarray, labels: np.ndarray, change: AttackConfig) -> Changed:
        return program.changed(images[index], labels, change, rng)

    return MatesResult(
        program.slots,
        run(functools.partial(outcome, mates=False), first, own),
        jax.tree.map(lambda x: x.reshape(groups.shape[:2]), drawn),
        [run(functools.partial(changed, change=change), first, own) for change in changes],
    )


def num_steps(size: int, config: MatesConfig, changes: int, batch_size: int) -> int:
    """How often ``attack_mates`` calls ``on_step``, for groups of a size."""
    at_once = _groups_at_once(batch_size, size)
    return -(-config.victims * config.draws // at_once) + (1 + changes) * -(
        -config.victims // at_once
    )


def _groups_at_once(batch_size: int, size: int) -> int:
    return max(1, batch_size // size)


def _in_batches(
    at_once: int, on_step: Callable[[], None], run: Callable[..., Any], *arrays: np.ndarray
) -> Any:
    """Runs on parts of one length of the arrays, and joins what it returns."""
    parts = []
    for start in range(0, len(arrays[0]), at_once):
        part = [array[start : start + at_once] for array in arrays]
        real = len(part[0])
        padded = [np.resize(each, (at_once, *each.shape[1:])) for each in part]  # repeats
        parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[:real], run(*padded)))
        on_step()
    return jax.tree.map(lambda *each: np.concatenate(each), *parts)


class _Routing(NamedTuple):
    """What may differ between the calls of one compiled program."""

    slots: dict[int, Int[Array, ""]]
    priority: Int[Array, ""]
    victim: Bool[Array, "_"]  # of the places of a group


class _Program:
    """A model under a setting, for groups of pixels: f32[g m h w 3]."""

    def __init__(
        self,
        model: ViT,
        setting: Setting,
        images: Float[np.ndarray, "b h w 3"],
        victim: Bool[np.ndarray, "_"],
    ):
        n = jax.eval_shape(model.embed, images[:1]).shape[1]
        overrides = RoutingOverrides(
            capacity_factor=setting.capacity_factor,
            dropless=True if setting.capacity_factor is None else None,
            images_per_group=1 if setting.split else None,
        )
        config = overrides.apply(model.config)
        self.slots = {
            i: slots_and_factor(moe, n * moe.images_per_group)[0]
            for i, moe in config.moe_blocks.items()
        }
        roomy = config.with_layers(
            lambda moe: replace(moe, capacity=n * moe.images_per_group, dropless=False)
        )
        self._graph, self._state = nnx.split(models.with_params(roomy, models.params_of(model)))
        self._routing = _Routing(
            {i: jnp.int32(slots) for i, slots in self.slots.items()},
            jnp.int32(PRIORITIES.index(setting.priority)),
            jnp.asarray(victim),
        )

    def outcome(self, groups: np.ndarray, labels: np.ndarray, mates: bool = True) -> Outcome:
        valid = self._routing.victim | mates
        values = _outcome(self._graph, self._state, self._routing, groups, labels, valid)
        return Outcome(*map(np.asarray, values))

    def changed(
        self,
        groups: np.ndarray,
        labels: np.ndarray,
        config: AttackConfig,
        rng: np.random.Generator,
    ) -> Changed:
        traced = np.float32(config.epsilon * PIXEL)
        config = dataclasses.replace(config, epsilon=0.0, project=True)
        routing = self._routing
        climbed = _climb(self._graph, config, self._state, routing, groups, traced)
        changed, surrogates = map(np.asarray, climbed)
        signs = rng.choice([-1.0, 1.0], groups.shape)
        control = np.clip(groups + signs * np.abs(changed - groups), -1.0, 1.0)
        return Changed(
            self.outcome(changed, labels),
            self.outcome(control.astype(np.float32), labels),
            surrogates,
        )


def _forward(
    model: ViT, routing: _Routing, groups: jax.Array, valid: jax.Array
) -> tuple[jax.Array, dict[int, Record]]:
    """The logits (g, m, y) and the records."""
    g, m = groups.shape[:2]
    decide = {i: limited(slots, routing.priority) for i, slots in routing.slots.items()}
    logits, records = model.forward(
        groups.reshape(g * m, *groups.shape[2:]), valid=jnp.tile(valid, g), decide=decide
    )
    return logits.reshape(g, m, -1), records


@functools.partial(jax.jit, static_argnums=0)
def _outcome(
    graph: nnx.GraphDef,
    state: nnx.State,
    routing: _Routing,
    groups: jax.Array,
    labels: jax.Array,
    valid: jax.Array,
) -> tuple[jax.Array, ...]:
    """The fields of ``Outcome``, for one group of each victim."""
    logits, records = _forward(nnx.merge(graph, state, copy=True), routing, groups, valid)
    place = routing.victim.argmax()
    own = logits[:, place]
    dropped = [
        _by_image(_routing_of(record).dropped, *groups.shape[:2])[:, place].mean((1, 2))
        for record in records.values()
    ]
    return cross_entropy(own, labels), own.argmax(-1), jnp.stack(dropped).mean(0)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _climb(
    graph: nnx.GraphDef,
    config: AttackConfig,
    state: nnx.State,
    routing: _Routing,
    groups: jax.Array,
    largest: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The groups after the mates climbed the surrogate, and the surrogate before and after."""
    model = nnx.merge(graph, state, copy=True)
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
    """The fraction of a victim's choices whose expert its mates fill, for each of g groups.

    Differentiable: mates fill an expert by the sum of their tokens' gates, relative to its slots,
    up to 1. So pixels change where experts of the victim are not full yet, and a larger gate is
    also a higher priority. The mean over sparse blocks; in [0, 1].

    Args:
        slots: of an expert in a group of this size.
        victim: True at the victim's place in a group.
    """
    fractions = []
    for i, record in records.items():
        gates = _by_image(record.gates, g, len(victim))
        filled = jnp.where(victim[:, None, None], 0.0, gates).sum((1, 2)) / slots[i]
        chosen = _by_image(_routing_of(record).experts, g, len(victim))[:, victim.argmax()]
        share = jax.nn.one_hot(chosen, gates.shape[-1]).mean((1, 2))
        fractions.append((share * jnp.minimum(filled, 1.0)).sum(-1))
    return jnp.stack(fractions).mean(0)


def _by_image(groups: jax.Array, g: int, m: int) -> jax.Array:
    """Arrays (groups, tokens, x) of the layer's own groups as (g, m, n, x)."""
    tokens = groups.shape[0] * groups.shape[1]
    images = ungroup(groups, g * m, tokens // (g * m))
    return images.reshape(g, m, *images.shape[1:])


def _routing_of(record: Record) -> Routing:
    assert isinstance(record.routing, Routing)  # check_mates refuses other routers
    return record.routing
