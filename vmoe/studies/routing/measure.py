"""The routing of a trained model on a split."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vmoe.analysis.collect import Collected, collect, concatenate
from vmoe.analysis.compare import agreement, saturation
from vmoe.analysis.effects import BatchDependence, batch_dependence
from vmoe.analysis.export import export
from vmoe.analysis.patches import TopPatches, with_top_patches
from vmoe.analysis.statistics import BlockStatistics, statistics
from vmoe.data.pipeline import Batch, evaluation_order
from vmoe.data.sources import Source
from vmoe.data.sources.views import Subset
from vmoe.factory import Loaded
from vmoe.health import Finding, findings
from vmoe.nn.vit import ViT

Batches = Callable[[], Iterator[Batch]]
"""Reads the images from the first one on, at each call."""
TOP_PATCHES = 12
"""Patches to keep per expert."""


class MeasuredRouting(NamedTuple):
    """How a model uses its experts on a data set.

    Attributes:
        loaded: the model.
        data: the name of the data set to show.
        batches: reads the batches of the data set.
        batch_size: images per batch and device.
        predictions: the class with the largest logit of each image.
        blocks: the statistics by sparse block.
        top_patches: by sparse block, the top patches of each expert; without the blocks whose
            router has no gate.
        dependence: how much predictions depend on the other images of a batch.
        findings: the problems found; empty if there are none.
    """

    loaded: Loaded
    data: str
    batches: Batches
    batch_size: int
    predictions: Int[np.ndarray, "b"]
    blocks: dict[int, BlockStatistics]
    top_patches: dict[int, TopPatches]
    dependence: BatchDependence
    findings: list[Finding]

    @property
    def model_name(self) -> str:
        """The path of the model and its step, as a name to show."""
        step = "" if self.loaded.step is None else f", step {self.loaded.step:,}"
        return f"{self.loaded.origin.path}{step}"

    def first(self, count: int) -> Float[np.ndarray, "b h w 3"]:
        """The first images that were measured."""
        images = itertools.chain.from_iterable(each.images[each.valid] for each in self.batches())
        return np.stack(list(itertools.islice(images, count)))

    @property
    def labels(self) -> Int[np.ndarray, "b l"]:
        """The classes of each image; padded with -1."""
        return next(iter(self.blocks.values())).labels


def measure_routing(
    loaded: Loaded,
    data: str,
    batches: Batches,
    reordered: Iterable[Batch],
    *,
    batch_size: int = 64,
    on_batch: Callable[[], None] = lambda: None,
) -> MeasuredRouting:
    """Measures the routing of every image in one pass, and looks for problems.

    Args:
        data: the name of the data set to show.
        batches: reads the batches of the data set.
        reordered: the images whose predictions are compared in several orders.
        batch_size: images per batch and device in these orders.
        on_batch: called after each batch.

    Raises:
        UsageError: there is no image, or no sparse block.
    """
    predictions: list[np.ndarray] = []
    best: dict[int, TopPatches] = {}

    def note(part: Collected) -> None:
        predictions.append(part.logits.argmax(-1))
        on_batch()

    shown, read = itertools.tee(batches())  # advance together, so two batches are held
    parts = _collected(loaded, read, note)
    patch_size = loaded.model.config.patch_size
    blocks = statistics(with_top_patches(best, shown, parts, patch_size, top=TOP_PATCHES))
    images = np.concatenate([batch.images[batch.valid] for batch in reordered])
    dependence = batch_dependence(loaded.model, images, batch_size=batch_size)
    config = loaded.model.config
    found = findings(config, blocks, dependence.changed)
    best = {i: best[i] for i, moe in config.moe_blocks.items() if moe.router.learned}
    every = np.concatenate(predictions)
    return MeasuredRouting(
        loaded, data, batches, batch_size, every, blocks, best, dependence, found
    )


def write_routing(
    path: Path,
    routing: MeasuredRouting,
    source: Source,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Writes the routing of every token, in another pass; see ``vmoe.analysis.export``.

    Args:
        source: the images of ``routing.batches``; their indices are written too. For a sample,
            these are the indices in its split.
        on_batch: called after each batch.
    """
    read, batches = itertools.tee(routing.batches())  # advance together, so two batches are held
    parts = _collected(routing.loaded, batches, lambda _: on_batch())
    export(path, parts, _indices(source, read))


def _collected(
    loaded: Loaded, batches: Iterable[Batch], on_part: Callable[[Collected], None]
) -> Iterator[Collected]:
    for part in collect(loaded.model, batches):
        yield part
        on_part(part)


def _indices(source: Source, batches: Iterable[Batch]) -> Iterator[Int[np.ndarray, "_"]]:
    """For each batch, the indices of its images in the split."""
    order, start = evaluation_order(len(source)), 0
    for batch in batches:
        own = order[start + np.flatnonzero(batch.valid)]
        yield source.indices[own] if isinstance(source, Subset) else own
        start += len(batch.valid)


def compare_routing(
    one: ViT, other: ViT, batches: Iterable[Batch], other_batches: Iterable[Batch]
) -> dict[int, dict[str, float | None]]:
    """How much the routers of two models agree on the tokens of the same images.

    Args:
        batches: the images, prepared for the first model.
        other_batches: the same images, prepared for the other model.

    Returns:
        by sparse block: "agreement" and "agreement_by_chance" between corresponding experts, see
        ``vmoe.analysis.agreement``; and "same_choices", the fraction of the first model's choices
        that the other model also makes, which has a meaning for two steps of one run (None if
        tokens do not choose). Empty if the models differ in sparse blocks or number of tokens.
    """
    first, second = (
        concatenate(collect(model, images))
        for model, images in ((one, batches), (other, other_batches))
    )
    tokens, others = (
        {i: block.gates.shape[:2] for i, block in each.blocks.items()} for each in (first, second)
    )
    if tokens != others:
        return {}
    same = saturation(first, second)
    return {
        i: {"agreement": share, "agreement_by_chance": by_chance, "same_choices": same.get(i)}
        for i, (_, share, by_chance) in agreement(first, second).items()
    }
