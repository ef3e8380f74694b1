"""Predictions under changed routing: other slots, k or batches, removed experts, random routers.

Each function compiles one program for all values of its setting; ``at_k`` compiles one per k.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from vmoe import models, passes
from vmoe.analysis.interventions import ablated, limited, masked, randomized
from vmoe.axes import Route
from vmoe.config import RoutingOverrides, ViTConfig, replace
from vmoe.config.routing_file import is_comparable
from vmoe.data.pipeline import Batch
from vmoe.errors import UsageError
from vmoe.nn.vit import ViT
from vmoe.passes import in_batches
from vmoe.routing.priority import PRIORITIES, Priority
from vmoe.sharding import Placement

Way = Literal["ablated", "masked"]
WAYS: tuple[Way, ...] = get_args(Way)


class Removal(NamedTuple):
    """The removal of one expert.

    Attributes:
        block: number of the sparse block.
        expert: number of the expert.
        way: "ablated": its output is zero, so its tokens keep only their residual connection;
            "masked": it cannot be chosen, so its tokens go to other experts.
    """

    block: int
    expert: int
    way: Way


Logits = Float[np.ndarray, "b y"]


def removals(config: ViTConfig) -> list[Removal]:
    """The removal of every expert in both ways.

    The only expert of a block, and experts that no gate chooses, are just ablated.
    """
    return [
        Removal(block, expert, way)
        for block, moe in config.moe_blocks.items()
        for expert in range(moe.num_experts)
        for way in (WAYS if moe.num_experts > 1 and moe.router.learned else WAYS[:1])
    ]


def without_experts(
    model: ViT,
    batches: Iterable[Batch],
    which: Sequence[Removal],
    *,
    on_step: Callable[[], None] = lambda: None,
) -> dict[Removal, Logits]:
    """The logits of all images, with one expert removed at a time.

    Args:
        which: the removals; see ``removals``.
        on_step: called after each removal on each batch.

    Raises:
        UsageError: the model has no such removal.
    """
    if unknown := [each for each in which if each not in removals(model.config)]:
        raise UsageError("use some of removals(model.config)", which=unknown[0])
    sizes = {block: moe.num_experts for block, moe in model.config.moe_blocks.items()}

    def decide(masks: Any) -> dict[int, Route]:
        return {
            block: ablated(active, masked(choosable))
            for block, (active, choosable) in masks.items()
        }

    def mask(removal: Removal, block: int, way: str) -> np.ndarray:
        removed = removal.expert if (removal.block, removal.way) == (block, way) else -1
        return np.arange(sizes[block]) != removed

    masks = {
        removal: {block: tuple(mask(removal, block, way) for way in WAYS) for block in sizes}
        for removal in which
    }
    return _logits(model, batches, decide, masks, on_step)


def with_random_routers(
    model: ViT, batches: Iterable[Batch], *, seed: int = 0
) -> dict[int, Logits]:
    """The logits of all images with a random router in one sparse block at a time.

    Blocks without a gate are left out: random logits would change nothing.
    """
    blocks = model.config.sparse_blocks
    gated = [block for block, moe in model.config.moe_blocks.items() if moe.router.learned]

    def decide(block: jax.Array) -> dict[int, Route]:
        keys = jax.random.split(jax.random.key(seed), len(blocks))
        return {
            each: randomized(key, block == each) for each, key in zip(blocks, keys, strict=True)
        }

    return _logits(model, batches, decide, {block: np.int32(block) for block in gated})


def can_be_limited(config: ViTConfig) -> bool:
    """Whether a model has slots and a priority to change: every router has both."""
    routers = [moe.router for moe in config.moe_blocks.values()]
    return all(is_comparable(router) for router in routers)


def at_capacities(
    model: ViT,
    batches: Iterable[Batch],
    slots: Sequence[int],
    priorities: Sequence[Priority] = PRIORITIES,
    *,
    on_step: Callable[[], None] = lambda: None,
) -> dict[tuple[int, Priority], Logits]:
    """The logits of all images with other numbers of slots and priorities, in every sparse block.

    Args:
        slots: slots per expert and group; 0 drops every choice.
        on_step: called after each setting on each batch.

    Raises:
        UsageError: a router never drops a choice, see ``can_be_limited``; or a number of slots is
            negative.
    """
    if not slots or min(slots) < 0:
        raise UsageError("use numbers from 0 on", slots=list(slots))
    most = max(1, *slots)
    config = model.config.with_layers(
        lambda moe: replace(moe, router=moe.router.with_slots(capacity=most))
    )
    model = models.with_params(config, models.params_of(model), placement=model.placement)

    def decide(setting: tuple[jax.Array, jax.Array]) -> dict[int, Route]:
        return dict.fromkeys(config.sparse_blocks, limited(*setting))

    settings = {
        (number, priority): (np.int32(number), np.int32(PRIORITIES.index(priority)))
        for number in slots
        for priority in priorities
    }
    return _logits(model, batches, decide, settings, on_step)


def at_k(
    model: ViT,
    batches: Iterable[Batch],
    ks: Sequence[int],
    *,
    on_step: Callable[[], None] = lambda: None,
) -> dict[int, Logits]:
    """The logits of all images with other numbers of experts per token, in every sparse block.

    At a given capacity factor, the number of slots grows with k. Each k compiles its own program.

    Args:
        on_step: called after each k on each batch.

    Raises:
        UsageError: no router has a k, or a layer has fewer than k experts.
    """
    configs = {k: RoutingOverrides(k=k).apply(model.config) for k in ks}
    params, runs = models.params_of(model), {}
    for k, config in configs.items():
        changed = models.with_params(config, params, placement=model.placement)
        runs[k] = functools.partial(_program(changed, lambda _: {}), None)
    return _of_each(runs, batches, model.placement, on_step)


class BatchDependence(NamedTuple):
    """How much predictions depend on the images that share a batch.

    Attributes:
        changed: fraction of the images whose prediction is not the same in every order.
        largest: largest difference of a logit between two orders.
    """

    changed: float
    largest: float


def batch_dependence(
    model: ViT,
    images: Float[np.ndarray, "b h w 3"],
    *,
    batch_size: int = 64,
    orders: int = 8,
    seed: int = 0,
) -> BatchDependence:
    """Predicts images in several random orders, so that their batches and groups differ.

    Args:
        batch_size: images per batch and device; the last batch is padded.
        orders: number of orders, including the given one.
    """
    rng, b = np.random.default_rng(seed), len(images)
    every = [np.arange(b), *(rng.permutation(b) for _ in range(orders - 1))]
    batches = (
        batch
        for order in every
        for batch in in_batches(
            images[order], batch_size=min(batch_size, b) * model.placement.devices
        )
    )
    (in_order,) = _logits(model, batches, lambda _: {}, {"as it is": None}).values()
    parts = np.split(in_order, orders)
    logits = np.stack([part[np.argsort(order)] for part, order in zip(parts, every, strict=True)])
    predictions = logits.argmax(-1)
    return BatchDependence(
        float((predictions != predictions[0]).any(0).mean()), float(np.ptp(logits, axis=0).max())
    )


def _logits(
    model: ViT,
    batches: Iterable[Batch],
    decide: Callable[[Any], Mapping[int, Route]],
    settings: Mapping[Any, Any],
    on_step: Callable[[], None] = lambda: None,
) -> dict[Any, Logits]:
    """The logits of all images under each setting; ``decide`` is traced once for all of them."""
    run = _program(model, decide)
    runs = {name: functools.partial(run, setting) for name, setting in settings.items()}
    return _of_each(runs, batches, model.placement, on_step)


def _program(model: ViT, decide: Callable[[Any], Mapping[int, Route]]) -> Callable[..., jax.Array]:
    """A compiled function of a setting and a batch."""

    @models.compiled
    def run(model: ViT, setting: Any, batch: Batch) -> jax.Array:
        images = jnp.asarray(batch.images)
        return model.forward(images, valid=batch.valid, decide=decide(setting))[0]

    return run(model)


def _of_each(
    runs: Mapping[Any, Callable[[Batch], jax.Array]],
    batches: Iterable[Batch],
    placement: Placement,
    on_step: Callable[[], None],
) -> dict[Any, Logits]:
    """The logits of all images from each function; a batch is uploaded once for all of them."""

    def program(batch: Batch) -> tuple[list[jax.Array], None]:
        logits = []
        for run in runs.values():
            logits.append(jax.block_until_ready(run(batch)))
            on_step()
        return logits, None

    parts = [part.outputs for part in passes.run(program, batches, placement)]
    by_name = zip(runs, *parts, strict=True)
    return {name: np.concatenate(each) for name, *each in by_name if each}
