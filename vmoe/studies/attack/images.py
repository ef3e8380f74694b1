"""Adversarial images: small changes of pixels that raise the loss of a model.

The published attack on V-MoE takes sign steps of one size without projection (arXiv 2210.10253).
For comparison, projected steps (PGD, arXiv 1706.06083) stay within the range of pixels.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vmoe import models
from vmoe.analysis.statistics import standard_error
from vmoe.axes import Decision, Images, Record, Route, RouterInputs, Routing, Valid
from vmoe.data.pipeline import Batch
from vmoe.errors import require
from vmoe.evaluate.metrics import check_finite
from vmoe.nn.inputs import check_labels, has_label, is_label, label_vectors
from vmoe.nn.losses import cross_entropy
from vmoe.nn.vit import ViT
from vmoe.routing.groups import by_image
from vmoe.routing.load import processing_experts
from vmoe.routing.router import Router
from vmoe.studies.attack.config import AttackConfig, AttackMethod

PIXEL = 2 / 255
"""One step of an 8-bit pixel, in units of images in [-1, 1]."""


class AttackResult(NamedTuple):
    """A model on images before and after an attack.

    Attributes:
        images: after the attack.
        losses_before: ``label_loss`` of each image before the attack.
        losses_after: the same after the attack.
        predictions_before: the class with the largest logit before the attack.
        predictions_after: the same after the attack.
        overlap: by block, for each image the mean over its tokens of the overlap (intersection
            over union) of the experts that process it before and after; 1 where none does.
    """

    images: Float[np.ndarray, "b h w 3"]
    losses_before: Float[np.ndarray, "b"]
    losses_after: Float[np.ndarray, "b"]
    predictions_before: Int[np.ndarray, "b"]
    predictions_after: Int[np.ndarray, "b"]
    overlap: dict[int, Float[np.ndarray, "b"]]


def attack(
    model: ViT,
    images: Images,
    labels: Int[np.ndarray, "b l"],
    config: AttackConfig,
    *,
    valid: Valid | None = None,
) -> AttackResult:
    """Attacks a batch; its images share groups, so the gradient of one reaches the others.

    Args:
        labels: classes; padded with -1. The loss of an image without a label is constant: it is
            part of its group, but is not attacked.
        valid: False for padding, which the result leaves out; None if there is none.

    Raises:
        UsageError: as for ``check_attack``.
        Failure: a logit before or after the attack is NaN or infinite.
    """
    check_attack(model, config)
    check_labels(labels, model.config.num_classes)
    same = dataclasses.replace(config, epsilon=0.0)  # traced, so that one program serves all
    largest = jnp.float32(config.epsilon * PIXEL)
    there = np.ones(len(images), bool) if valid is None else np.asarray(valid)
    batch = model.placement.make_global_array(Batch(np.asarray(images), labels, there))
    results = _run(model, same)(batch, largest)
    changed, (first, losses), (last, new_losses), overlap = jax.tree.map(
        lambda x: np.asarray(x)[there], results
    )
    for logits in (first, last):
        check_finite(logits)
    return AttackResult(changed, losses, new_losses, first.argmax(-1), last.argmax(-1), overlap)


def summary(parts: Sequence[AttackResult], labels: Int[np.ndarray, "b l"]) -> dict[str, Any]:
    """Means over the images that have a label, accuracies with their standard errors.

    Args:
        labels: the classes of the images of all parts; padded with -1.
    """
    known = has_label(labels)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])[known]

    before, after = joined("predictions_before"), joined("predictions_after")
    overlap = {i: np.concatenate([part.overlap[i] for part in parts]) for i in parts[0].overlap}
    right_before, right_after = (is_label(each, labels[known]) for each in (before, after))
    return {
        "images": len(before),
        "unlabeled": len(known) - len(before),
        "accuracy_before": float(right_before.mean()),
        "standard_error_before": standard_error(right_before),
        "accuracy_after": float(right_after.mean()),
        "standard_error_after": standard_error(right_after),
        "changed": float((before != after).mean()),
        "loss_after": float(joined("losses_after").mean()),
        "overlap": {str(i): float(each[known].mean()) for i, each in overlap.items()},
    }


def check_attack(model: ViT, config: AttackConfig) -> None:
    """Checks that a model can be attacked along a gradient path.

    Raises:
        UsageError: for a path other than "all", the model has no sparse block, or a router whose
            tokens do not choose; for "routers", it has no gate. Or for such a path, or for
            auxiliary losses, whose share of the gradient depends on the images of a batch, it is
            on several devices.
    """
    blocks = model.config.moe_blocks
    alone = model.placement.devices == 1 or not needs_one_device(config)
    if config.gradient_path == "all":
        require(alone, "use one device", **{"attack.auxiliary_loss": config.auxiliary_loss})
        return
    path = {"attack.gradient_path": config.gradient_path}
    require(bool(blocks), "no block of this model is sparse; use gradient_path=all", **path)
    for router in (block.router for block in blocks.values()):
        makes = f"router {router.kind} makes no choices of tokens; use gradient_path=all"
        require(router.can_drop, makes, **path)
    require(
        config.gradient_path != "routers" or model.config.learned,
        "no router of this model reads pixels; use another path",
        **path,
    )
    require(alone, "use one device, or gradient_path=all", **path)


def needs_one_device(method: AttackMethod) -> bool:
    """Whether an attack cannot be split over several devices."""
    return method.gradient_path != "all" or method.auxiliary_loss


@models.compiled
def _run(model: ViT, config: AttackConfig, batch: Batch, largest: Float[Array, ""]) -> Any:
    """The images after the attack, the logits and losses before and after, and the overlaps."""
    images, labels, valid = jnp.asarray(batch.images), jnp.asarray(batch.labels), batch.valid
    first, records = model.forward(images, valid=valid)
    changed = sign_steps(
        lambda changed: gradient(model, changed, labels, records, config, valid=valid),
        images,
        config,
        largest,
    )
    last, new_records = model.forward(changed, valid=valid)
    overlap = {
        i: _overlap(record, new_records[i], len(images), model.placement.devices)
        for i, record in records.items()
        if isinstance(record.routing, Routing)
    }
    results = [(logits, label_loss(logits, labels)) for logits in (first, last)]
    return model.placement.replicate((changed, *results, overlap))


def sign_steps(
    direction: Callable[[jax.Array], jax.Array],
    images: Float[Array, "*b h w 3"],
    config: AttackConfig,
    largest: Float[Array, ""],
) -> Float[Array, "*b h w 3"]:
    """The images after steps along the sign of a direction that depends on them.

    Args:
        direction: a gradient; where it is 0, pixels stay as they are.
        config: only ``steps`` and ``project`` are used.
        largest: the largest change, in units of the images.
    """
    size = (2.5 if config.project else 1.0) * largest / config.steps

    def step(_: jax.Array, changed: jax.Array) -> jax.Array:
        changed += size * jnp.sign(direction(changed))
        if config.project:
            changed = jnp.clip(changed, images - largest, images + largest)
            changed = jnp.clip(changed, -1.0, 1.0)
        return changed

    return jax.lax.fori_loop(0, config.steps, step, images)


def gradient(
    model: ViT,
    images: Float[Array, "b h w 3"],
    labels: Int[Array, "b l"],
    records: dict[int, Record],
    config: AttackConfig,
    *,
    valid: Valid | None = None,
) -> Float[Array, "b h w 3"]:
    """The gradient of the loss with respect to the images, along the path of the config.

    Args:
        records: records of the original images; the path "experts" keeps their decisions.
        valid: False for padding, which must have no label; None if there is none.
    """

    def loss(images: jax.Array, decide: Mapping[int, Route] | None = None) -> jax.Array:
        logits, records = model.forward(images, valid=valid, decide=decide)
        total = label_loss(logits, labels).mean(where=valid)
        if config.auxiliary_loss:
            total += sum((record.aux_loss for record in records.values()), jnp.zeros(()))
        return total

    match config.gradient_path:
        case "all":
            return jax.grad(loss)(images)
        case "experts":
            decide = {i: _fixed(routing_of(record)) for i, record in records.items()}
            return jax.grad(loss)(images, decide)
    return _through_weights(model, images, loss, valid)


def _through_weights(
    model: ViT,
    images: jax.Array,
    loss: Callable[[jax.Array, Mapping[int, Route]], jax.Array],
    valid: Valid | None,
) -> jax.Array:
    """The sum over blocks of (d loss / d weights) (d weights / d images)."""

    def weights(images: jax.Array) -> tuple[dict[int, jax.Array], dict[int, Record]]:
        _, records = model.forward(images, valid=valid)
        return {i: routing_of(record).weights for i, record in records.items()}, records

    own, pull_back, records = jax.vjp(weights, images, has_aux=True)

    def with_weights(weights: dict[int, jax.Array]) -> jax.Array:
        routing = {
            i: routing_of(record)._replace(weights=weights[i]) for i, record in records.items()
        }
        return loss(images, {i: _fixed(each) for i, each in routing.items()})

    return pull_back(jax.grad(with_weights)(own))[0]


def routing_of(record: Record) -> Routing:
    """The routing of a block whose router makes choices; the checks exclude other routers."""
    assert isinstance(record.routing, Routing)
    return record.routing


def _fixed(routing: Routing) -> Route:
    """A function that decides as given, for any logits."""

    def decide(inputs: RouterInputs, router: Router, c: int) -> Decision:
        own = router(inputs, c)
        losses = {name: jax.lax.stop_gradient(loss) for name, loss in own.losses.items()}
        return Decision(own.gates, routing, losses)

    return decide


def label_loss(
    logits: Float[Array, "b y"], labels: Int[Array, "b l"] | Int[np.ndarray, "b l"]
) -> Float[Array, "b"]:
    """The softmax cross-entropy of each image, in nats, even if another loss trained the model.

    Several labels share the target equally, as in training. The loss is 0 without a label.
    """
    targets = label_vectors(labels, logits.shape[-1], normalize=True)
    return cross_entropy(logits, targets, "softmax")


def _overlap(before: Record, after: Record, b: int, devices: int) -> Float[Array, "b"]:
    first, last = (
        by_image(processing_experts(routing_of(record)), b, devices) for record in (before, after)
    )
    both, either = (first & last).sum(-1), (first | last).sum(-1)
    return jnp.where(either > 0, both / jnp.maximum(either, 1), 1.0).mean(-1)
