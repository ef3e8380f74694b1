"""Measures one trained model on test images, and prints one JSON object.

"figures" has the figures below by name. "correct" has, for each figure that is a share of correct
images, which images these are (see ``pack``). "labels" is a checksum of the labels. Images are in
the order of the data.

    python -m scripts.experiments.claims.measure RUN [--images 10000] [--changes attacks merged]

accuracy                 fraction of correct predictions, as trained
dropped.BLOCK            fraction of the choices without a slot, as trained
class.BLOCK              normalized mutual information of expert and class
class_null.BLOCK         the same under shuffled classes
position.BLOCK           normalized mutual information of expert and position
position_null.BLOCK      the same under shuffled positions
capacity.SLOTS.PRIORITY  accuracy with so many slots per expert and group; 0 drops everything
kept.BLOCK.KIND          fraction of the choices of foreground patches, background patches or class
                         tokens that get one of 8 slots by largest gate
attack.EPSILON           accuracy after the published attack by EPSILON / 255; 0: before
attack.EPSILON.PATH      the same with gradients through the experts or the routers alone
attack.EPSILON.projected the same by projected steps
random.BLOCK             accuracy with a random router in that block
merged                   accuracy with the mean of its experts as the MLP of each sparse block,
                         unless it has shared experts
batch                    fraction of predictions that change with the order of the images
"""

import argparse
import base64
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from vmoe import models
from vmoe.analysis import statistics
from vmoe.analysis.collect import collect
from vmoe.analysis.effects import (
    at_capacities,
    batch_dependence,
    can_be_limited,
    with_random_routers,
)
from vmoe.analysis.interventions import limited
from vmoe.config import ViTConfig
from vmoe.data.pipeline import Batch, evaluation_order
from vmoe.evaluate.sample import Sample
from vmoe.factory import load
from vmoe.nn.inputs import is_label
from vmoe.nn.vit import ViT
from vmoe.routing.priority import PRIORITIES
from vmoe.studies.attack.config import AttackConfig, GradientPath
from vmoe.studies.attack.images import attack
from vmoe.surgery.experts import average_experts

SLOTS = (0, 4, 8, 12, 16, 24, 36)
"""Slots per expert for a group of 8 images: 128 patches, or 136 tokens with class tokens."""
LOW = 8
"""Slots at which priorities are compared: a capacity factor of 0.25 for the standard model."""
STRENGTHS = (1, 2, 4, 8)
PATHS: tuple[GradientPath, ...] = ("experts", "routers")
ATTACKED = 512  # images
ACCURACIES = ("accuracy", "attack", "capacity", "random", "merged")
"""The figures that are a share of correct images: the first parts of their names."""
BATCH_SIZE = 64
CHANGES = ("attacks", "batch", "random_routers", "merged", "capacities", "kept")
"""What can be measured beside a model as trained; the first two of ``ATTACKED`` images."""

Correct = Bool[np.ndarray, "b"]
Figures = Iterator[tuple[str, float | Correct]]
Batches = list[Batch]


def measure(run: Path, images: int, only: Collection[str] = CHANGES) -> dict[str, Any]:
    """The measurements of a run on a random sample of its test split.

    Args:
        only: of ``CHANGES``.
    """
    loaded = load(run)
    model = loaded.model
    batches, few = (
        Batches(Sample("", loaded, images=count, batch_size=BATCH_SIZE).batches())
        for count in (images, min(images, ATTACKED))
    )
    found = dict(as_trained(model, batches))
    for name, function in changes(model.config).items():
        if name in only:
            found |= dict(function(model, few if name in CHANGES[:2] else batches))
    return {
        "labels": zlib.crc32(in_order(labels_of(batches)).tobytes()),
        "figures": {name: float(np.mean(each)) for name, each in found.items()},
        "correct": {
            name: pack(in_order(each))
            for name, each in found.items()
            if isinstance(each, np.ndarray)
        },
    }


def changes(config: ViTConfig) -> dict[str, Callable[[ViT, Batches], Figures]]:
    """Those of ``CHANGES`` that a model allows."""
    functions: dict[str, Callable[[ViT, Batches], Figures]] = {"attacks": attacks}
    if config.sparse_blocks:
        functions["batch"] = in_orders
    if config.can_drop:
        functions["random_routers"] = random_routers
        if not any(moe.shared_experts for moe in config.moe_blocks.values()):
            functions["merged"] = merged
    if config.sparse_blocks and can_be_limited(config):
        functions |= {"capacities": capacities, "kept": kept}
    return functions


def labels_of(batches: Batches) -> Int[np.ndarray, "b l"]:
    return np.concatenate([labels[valid] for _, labels, valid in batches])


def in_order(measured: np.ndarray) -> np.ndarray:
    """Measurements of each image, in the order of the data."""
    return measured[np.argsort(evaluation_order(len(measured)))]


def as_trained(model: ViT, batches: Batches) -> Figures:
    parts = list(collect(model, batches))
    yield "accuracy", correct(np.concatenate([part.logits for part in parts]), batches)
    if not model.config.sparse_blocks:
        return
    for i, block in statistics(parts).items():
        yield f"dropped.{i}", block.dropped
        if block.choices.any():
            own, null = block.class_information(model.config.num_classes)
            yield f"class.{i}", own
            yield f"class_null.{i}", null
            own, null = block.position_information
            yield f"position.{i}", own
            yield f"position_null.{i}", null


def in_orders(model: ViT, batches: Batches) -> Figures:
    images = np.concatenate([own[valid] for own, _, valid in batches])
    yield "batch", batch_dependence(model, images, batch_size=BATCH_SIZE).changed


def capacities(model: ViT, batches: Batches) -> Figures:
    for (slots, priority), logits in at_capacities(model, batches, SLOTS, PRIORITIES).items():
        yield f"capacity.{slots}.{priority}", correct(logits, batches)


def random_routers(model: ViT, batches: Batches) -> Figures:
    for i, logits in with_random_routers(model, batches).items():
        yield f"random.{i}", correct(logits, batches)


def merged(model: ViT, batches: Batches) -> Figures:
    dense = models.with_params(*average_experts(model.config, models.params_of(model)))
    logits = np.concatenate([part.logits for part in collect(dense, batches)])
    yield "merged", correct(logits, batches)


def correct(logits: Float[np.ndarray, "b y"], batches: Batches) -> Correct:
    return is_label(logits.argmax(-1), labels_of(batches))


def kept(model: ViT, batches: Batches) -> Figures:
    route = limited(jnp.int32(LOW), jnp.int32(PRIORITIES.index("largest_gate")))
    decide = dict.fromkeys(model.config.sparse_blocks, route)
    for i, block in statistics(collect(model, batches, decide=decide)).items():
        for kind, share in block.kept_share.items():
            if share is not None:
                yield f"kept.{i}.{kind}", share


def attacks(model: ViT, batches: Batches) -> Figures:
    for strength in (0, *STRENGTHS):  # one program serves all
        yield f"attack.{strength}", after(model, batches, strength)
    yield f"attack.{STRENGTHS[-1]}.projected", after(model, batches, STRENGTHS[-1], project=True)
    if model.config.can_drop:
        for path in PATHS if model.config.learned else PATHS[:1]:
            name = f"attack.{STRENGTHS[-1]}.{path}"
            yield name, after(model, batches, STRENGTHS[-1], path=path)


def after(
    model: ViT,
    batches: Batches,
    strength: int,
    *,
    path: GradientPath = "all",
    project: bool = False,
) -> Correct:
    """Which images are predicted correctly after an attack."""
    config = AttackConfig(epsilon=float(strength), gradient_path=path, project=project)
    parts = []
    for images, labels, valid in batches:
        result = attack(model, images[valid], labels[valid], config)
        parts.append(is_label(result.predictions_after, labels[valid]))
    return np.concatenate(parts)


def pack(correct: Correct) -> dict[str, Any]:
    """Which images are predicted correctly, as JSON: their number, and one bit each in base64."""
    return {
        "images": len(correct),
        "bits": base64.b64encode(np.packbits(correct).tobytes()).decode(),
    }


def unpack(stored: Mapping[str, Any]) -> Correct:
    """The argument of ``pack``."""
    packed = np.frombuffer(base64.b64decode(stored["bits"]), np.uint8)
    return np.unpackbits(packed, count=stored["images"]).astype(bool)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--images", type=int, default=10_000, help="of the test split")
    parser.add_argument("--changes", nargs="*", choices=CHANGES, default=CHANGES)
    options = parser.parse_args()
    print(json.dumps(measure(options.run, options.images, options.changes)))


if __name__ == "__main__":
    main()
