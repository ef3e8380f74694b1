"""Batch-mates as an attack surface: how far the other images of its group change a prediction.

Under a capacity the images of a group compete for slots, so one image (the victim) can lose its
slots to the others (its mates). There are two attacks. Random search draws many groups and keeps
the worst. Gradient steps change the pixels of the mates: slots are piecewise constant, so no
gradient leads from a mate to the victim's prediction, and the steps maximize a surrogate, how far
the mates fill the experts that the victim chose. Mates change nothing if the model is dropless or
groups have one image.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from vmoe.analysis.statistics import standard_error
from vmoe.config import RoutingOverrides, ViTConfig
from vmoe.config.routing_file import check_comparable
from vmoe.errors import require
from vmoe.evaluate.metrics import check_finite
from vmoe.nn.inputs import check_labels, has_label, is_label
from vmoe.nn.vit import ViT
from vmoe.studies.attack.config import AttackConfig, MatesConfig
from vmoe.studies.attack.images import PIXEL
from vmoe.studies.attack.mates_program import Outcome, climb, predict_victims, with_room


class Changed(NamedTuple):
    """Victims with the mates of the first draw after their pixels were changed.

    Attributes:
        optimized: with mates that maximize the surrogate.
        control: with mates whose pixels were changed by the same amounts, with random signs.
        surrogate: the surrogate before and after, in [0, 1]; see ``mates_program.surrogate``.
    """

    optimized: Outcome
    control: Outcome
    surrogate: Float[np.ndarray, "b 2"]


class MatesResult(NamedTuple):
    """Victims under one setting.

    Attributes:
        slots: slots per expert and group, by block.
        without: the victims without mates, with the same slots.
        drawn: the victims with the mates of every draw.
        changed: the victims with changed mates, for each way to change them.
    """

    slots: dict[int, int]
    without: Outcome
    drawn: Outcome
    changed: list[Changed]


def settings(config: MatesConfig) -> list[RoutingOverrides]:
    """Every capacity and priority, then two settings that are immune."""
    tried = [
        RoutingOverrides(capacity_factor=factor, priority=priority)
        for factor in config.capacity_factor
        for priority in config.priority
    ]
    first, tightest = config.priority[0], min(config.capacity_factor)
    return [
        *tried,
        RoutingOverrides(dropless=True, priority=first),
        RoutingOverrides(capacity_factor=tightest, priority=first, images_per_group=1),
    ]


def check_mates(model: ViT) -> None:
    """Checks that the images of a group can take each other's slots.

    Raises:
        UsageError: no block is sparse, a router drops no choice or has no gate or no priority,
            groups have one image or different sizes, or there are several devices.
    """
    layers = model.config.moe_blocks.values()
    require(bool(layers), "no block of this model is sparse, so no image depends on its batch")
    for router in (layer.router for layer in layers):
        where = f"router {router.kind}"
        require(router.logits_per != "slot", f"{where} routes each image alone: no mate can attack")
        require(router.can_drop, f"{where} drops no choice that others take: no mate can attack")
        require(router.learned, f"{where} reads no pixels: no mate can attack")
        check_comparable(router)
    sizes = sorted({layer.router.images_per_group for layer in layers})
    field = "model.moe.router.images_per_group"
    require(len(sizes) == 1, "use the same in all blocks", **{field: sizes})
    require(sizes[0] > 1, "an image has no mates, so it is immune", **{field: sizes[0]})
    require(model.placement.devices == 1, "mates can be attacked on one device only")


def group_size(config: ViTConfig) -> int:
    """The number of images in a group, the same in all sparse blocks."""
    return next(iter(config.moe_blocks.values())).router.images_per_group


def draw_groups(total: int, size: int, config: MatesConfig) -> Int[np.ndarray, "b x _"]:
    """The images of each victim's groups: the victim at its index, among random other images.

    Args:
        total: number of images; the first ones are the victims.
        size: images per group.

    Raises:
        UsageError: there are too few images, or the index is outside the group.
    """
    victim_index = _victim_index(config, size)
    require(0 <= victim_index < size, f"use 0 to {size - 1}", **{"mates.index": victim_index})
    needed = max(size, config.victims)
    require(
        total >= needed,
        f"{config.victims} victims in groups of {size} need at least {needed}",
        images=total,
    )
    rng = np.random.default_rng(config.seed)
    groups = np.empty((config.victims, config.draws, size), int)
    for victim, draw in np.ndindex(groups.shape[:2]):
        others = rng.choice(total - 1, size - 1, replace=False)
        groups[victim, draw] = np.insert(others + (others >= victim), victim_index, victim)
    return groups


def _victim_index(config: MatesConfig, size: int) -> int:
    return size - 1 if config.index is None else config.index


def attack_mates(
    model: ViT,
    images: Float[np.ndarray, "b h w 3"],
    labels: Int[np.ndarray, "b l"],
    setting: RoutingOverrides,
    config: MatesConfig,
    changes: Sequence[AttackConfig] = (),
    *,
    batch_size: int = 64,
    on_step: Callable[[], None] = lambda: None,
) -> MatesResult:
    """Attacks the first images through mates that are drawn from all images.

    All settings have the same groups, and the same compiled programs unless groups are split.

    Args:
        labels: classes; padded with -1. A victim needs a label.
        setting: the routing, such as one of ``settings``.
        changes: ways to change the mates of the first draw; steps are always projected.
        batch_size: images per batch, at least one group; it does not change the results.
        on_step: called after each batch; see ``num_steps``.

    Raises:
        UsageError: a victim has no label.
    """
    check_mates(model)
    check_labels(labels, model.config.num_classes)
    own = labels[: config.victims]
    require(bool(has_label(own).all()), "labels: a victim has none; leave out such images")
    size = group_size(model.config)
    groups = draw_groups(len(images), size, config)
    victim_index = _victim_index(config, size)
    n = jax.eval_shape(model.embed, images[:1]).shape[1]
    roomy, routing = with_room(model, setting, n, victim_index)
    predict = predict_victims(roomy)
    at_once, first = _groups_at_once(batch_size, size), groups[:, 0]

    def run(function: Callable[..., Any], groups: np.ndarray, labels: np.ndarray) -> Any:
        return _in_batches(at_once, on_step, function, groups, labels)

    def victims(groups: np.ndarray, labels: np.ndarray, mates: bool = True) -> Outcome:
        return Outcome(*map(np.asarray, predict(routing, groups, labels, np.bool_(mates))))

    def in_groups(index: np.ndarray, labels: np.ndarray, mates: bool = True) -> Outcome:
        return victims(images[index], labels, mates)

    def changed_by(change: AttackConfig) -> Callable[[np.ndarray, np.ndarray], Changed]:
        same = dataclasses.replace(change, epsilon=0.0, project=True)  # one program for all epsilon
        climber, largest = climb(roomy, same), np.float32(change.epsilon * PIXEL)

        def changed(index: np.ndarray, labels: np.ndarray) -> Changed:
            mates = images[index]
            rngs = [
                np.random.default_rng((config.seed, victim)) for victim in index[:, victim_index]
            ]
            signs = np.stack([rng.choice([-1.0, 1.0], mates.shape[1:]) for rng in rngs])
            climbed, surrogates = map(np.asarray, climber(routing, mates, largest))
            control = np.clip(mates + signs * np.abs(climbed - mates), -1.0, 1.0).astype(np.float32)
            return Changed(victims(climbed, labels), victims(control, labels), surrogates)

        return changed

    drawn = run(in_groups, groups.reshape(-1, size), np.repeat(own, config.draws, axis=0))
    alone = functools.partial(in_groups, mates=False)
    return MatesResult(
        {i: int(slots) for i, slots in routing.slots.items()},
        run(alone, first, own),
        jax.tree.map(lambda x: x.reshape(groups.shape[:2]), drawn),
        [run(changed_by(change), first, own) for change in changes],
    )


def rows(
    setting: RoutingOverrides,
    result: MatesResult,
    labels: Int[np.ndarray, "b l"],
    changes: Sequence[AttackConfig],
) -> Iterator[dict[str, Any]]:
    """One row for each way to choose the mates.

    Args:
        labels: the classes of each victim; padded with -1.
    """
    first = Outcome(*(x[:, 0] for x in result.drawn))
    ways = [
        ("none", None, result.without, False),
        ("mean of the draws", None, result.drawn, False),
        ("worst of the draws", None, result.drawn, True),
        ("first draw", None, first, False),
    ]
    for change, changed in zip(changes, result.changed, strict=True):
        ways += [
            ("random signs", change.epsilon, changed.control, False),
            ("optimized", change.epsilon, changed.optimized, False),
        ]
    for mates, epsilon, outcome, worst in ways:
        yield {
            "capacity_factor": setting.capacity_factor,
            "priority": setting.priority,
            "split": setting.images_per_group == 1,
            "slots": {str(i): slots for i, slots in result.slots.items()},
            "mates": mates,
            "epsilon": epsilon,
            **measures(outcome, result.without, labels, worst=worst),
        }


def measures(
    outcome: Outcome, without: Outcome, labels: Int[np.ndarray, "b l"], *, worst: bool = False
) -> dict[str, float]:
    """Means over the victims, each in one or several groups.

    Args:
        without: the same victims without mates.
        labels: the classes of each victim; padded with -1.
        worst: take the worst group for each victim and measure, instead of the mean: correct in all
            groups, changed in any group.

    Returns:
        accuracy; standard_error of it, over the victims; changed, the fraction of predictions that
        differ from the prediction without mates; loss in nats; dropped, the fraction of the
        victims' choices that got no slot.

    Raises:
        Failure: a loss, and so a logit, is NaN or infinite.
    """
    check_finite(outcome.losses)
    losses, predictions, dropped = (x.reshape(len(labels), -1) for x in outcome)
    right = is_label(predictions.T, labels).T.astype(float)
    right = right.min(1) if worst else right.mean(1)
    changed = predictions != without.predictions[:, None]

    def over_groups(x: np.ndarray) -> float:
        return float((x.max(1) if worst else x.mean(1)).mean())

    return {
        "accuracy": float(right.mean()),
        "standard_error": standard_error(right),
        "changed": over_groups(changed),
        "loss": over_groups(losses),
        "dropped": over_groups(dropped),
    }


def num_steps(size: int, config: MatesConfig, changes: int, batch_size: int) -> int:
    """The number of calls of ``on_step`` by ``attack_mates``, for groups of ``size`` images."""
    at_once = _groups_at_once(batch_size, size)
    return -(-config.victims * config.draws // at_once) + (1 + changes) * -(
        -config.victims // at_once
    )


def _groups_at_once(batch_size: int, size: int) -> int:
    return max(1, batch_size // size)


def _in_batches(
    at_once: int, on_step: Callable[[], None], run: Callable[..., Any], *arrays: np.ndarray
) -> Any:
    """Runs a function on parts of equal length of the arrays, and joins the results."""
    parts = []
    for start in range(0, len(arrays[0]), at_once):
        part = [array[start : start + at_once] for array in arrays]
        real = len(part[0])
        padded = [np.resize(each, (at_once, *each.shape[1:])) for each in part]  # repeats
        parts.append(jax.tree.map(lambda x, real=real: np.asarray(x)[:real], run(*padded)))
        on_step()
    return jax.tree.map(lambda *each: np.concatenate(each), *parts)
