"""The images on which a trained model is measured: a split of its run's data set, or other data."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from vmoe import passes
from vmoe.checkpoints import StoredModel
from vmoe.config import ViTConfig
from vmoe.config.data import CHECKS
from vmoe.data.pipeline import Batch, start_workers
from vmoe.data.reading import Reading
from vmoe.data.sources import (
    SPLITS,
    Source,
    name_and_split,
    open_source,
    relabel,
    sample,
    skipped_messages,
)
from vmoe.data.sources.splits import NoSplit, named_splits
from vmoe.data.unreadable import Unreadable
from vmoe.data.workers import IN_THREADS, Workers
from vmoe.errors import UsageError
from vmoe.factory import Loaded
from vmoe.fields import at_least


def require_classes(path: Path | str, config: ViTConfig) -> None:
    """Raises a ``UsageError`` if the model of a path has no classes."""
    if not config.num_classes:
        raise UsageError(
            f"{path}: the model has no classes, only features: fine-tune it with a head, or probe "
            "its features"
        )


def open_data(
    data: str, trained: Loaded | StoredModel, *, split: str = "test"
) -> tuple[Source, bool]:
    """``open_any_classes``, with the classes of the model.

    Raises:
        UsageError: there is no such data, or it has other classes, or the model has none.
    """
    config = trained.model.config if isinstance(trained, Loaded) else trained.config
    require_classes(trained.origin.path, config)
    source, replace = open_any_classes(data, trained, split=split)
    return relabel(source, trained.class_names), replace


def open_any_classes(
    data: str, trained: Loaded | StoredModel, *, split: str
) -> tuple[Source, bool]:
    """A split, and whether unreadable images are left out, as in the model's run.

    Args:
        data: NAME[:SPLIT]; the data set of the model's run if empty.
        split: the split if ``data`` has none.

    Raises:
        UsageError: there is no such data.
    """
    data = data or data_of(trained)
    name, named = name_and_split(data)
    checks = trained.train_config.data.checks if trained.train_config else CHECKS
    try:
        source = open_source(name, named or split, checks)
    except NoSplit as error:
        if named:
            raise
        raise _name_one(error, name, split) from None
    return source, checks.on_error == "replace"


def _name_one(error: NoSplit, name: str, split: str) -> UsageError:
    """An error for data without the split that is used where none is named."""
    others = [each for each in SPLITS[::-1] if each in named_splits(error.available, name)]
    splits = ", ".join(error.available)
    problem = f"{name} has no split {split!r}, which is used if none is named; it has {splits}"
    if not others:
        return UsageError(f"{problem}: name one, as NAME:SPLIT").remedied_by(data=None)
    return UsageError(f"{problem}: use {name}:{others[0]}").remedied_by(data=f"{name}:{others[0]}")


def data_of(trained: Loaded | StoredModel) -> str:
    """The data set of the model's run, without the split it was trained on.

    Raises:
        UsageError: it is unknown.
    """
    name = trained.train_config.data.name if trained.train_config else ""
    if not name:
        problem = "data is missing: the checkpoint does not name its training data; name some"
        raise UsageError(problem).remedied_by(data="NAME")
    return name_and_split(name)[0]


class Sample:
    """A random sample of a split in batches.

    Attributes:
        source: the sampled images.
        workers: what reads them.
    """

    def __init__(
        self, data: str, loaded: Loaded, *, images: int, batch_size: int, split: str = "test"
    ):
        """Opens the data; see ``open_data``.

        Args:
            images: number of images; at most all of the split.
            batch_size: images per batch and device of the model.
        """
        at_least(1).check(images=images, batch_size=batch_size)
        self._whole, replace = open_data(data, loaded, split=split)
        self._loaded = loaded
        self._devices, self._share = loaded.model.placement.devices, batch_size
        self._left_out = Unreadable("left out")
        self._on_unreadable = self._left_out.add if replace else None
        self.source = sample(self._whole, images)
        self.workers = IN_THREADS

    @contextlib.contextmanager
    def start_workers(self, asked: int | None) -> Iterator[Workers]:
        """Starts what reads the images in this context; see ``pipeline.start_workers``."""
        size, how = self._batch_size(len(self.source)), self._loaded.preprocessing
        with start_workers(asked, self.source, size, how) as self.workers:
            yield self.workers
        self.workers = IN_THREADS

    def batches(self, at_most: int | None = None) -> Iterator[Batch]:
        """The inputs of the model; see ``passes.inputs``.

        Args:
            at_most: number of images, if smaller than the sample.
        """
        source = self.source
        if at_most is not None and at_most < len(source):
            source = sample(self._whole, at_most)
        size = self._batch_size(len(source))
        reading = Reading(size, self.workers, on_unreadable=self._on_unreadable)
        return passes.inputs(self._loaded.model, source, self._loaded.preprocessing, reading)

    @property
    def steps(self) -> int:
        """The number of batches."""
        return -(-len(self.source) // self._batch_size(len(self.source)))

    def _batch_size(self, images: int) -> int:
        """Images per batch, over all devices."""
        return min(self._share, images) * self._devices

    def messages(self) -> list[str]:
        """Remarks about images that were skipped or left out or have no label, one line each."""
        lines = [*skipped_messages([self.source]), *self._left_out.news()]
        images = len(self.source)
        if count := sum(not self.source.labels_of(i) for i in range(images)):
            what = "they count in no accuracy" if count > 1 else "it counts in no accuracy"
            lines.append(f"{count:,} of {images:,} images without a label: {what}")
        return lines
