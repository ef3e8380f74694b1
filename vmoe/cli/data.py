"""The data that ``--data`` names, for commands that measure a trained model."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Union

from vmoe.config import DataConfig
from vmoe.config.fields import at_least
from vmoe.errors import UsageError, one_line

if TYPE_CHECKING:
    from vmoe.checkpoints import StoredModel
    from vmoe.data.sources import Source
    from vmoe.factory import Loaded


def open_data(
    data: str, trained: Union["Loaded", "StoredModel"], *, split: str = "test"
) -> tuple["Source", bool]:
    """A split with the classes of a model, and whether unreadable images are left out.

    Args:
        data: NAME[:SPLIT]; the data set of the model's run if empty.
        split: if ``data`` names none.

    Raises:
        UsageError: there is no such data, or it has other classes.
    """
    from vmoe.data.sources import name_and_split, open_source, relabel

    data = data or data_of(trained)
    if not data:
        raise UsageError("--data is missing: the checkpoint does not name its training data")
    name, named = name_and_split(data)
    reading = trained.train_config.data if trained.train_config else DataConfig()
    source = open_source(name, named or split, check=reading.check, on_error=reading.on_error)
    return relabel(source, trained.class_names), reading.on_error == "replace"


def data_of(trained: Union["Loaded", "StoredModel"]) -> str:
    """The data set of the model's run, without the split it was trained on; empty if unknown."""
    from vmoe.data.sources import name_and_split

    return name_and_split(trained.train_config.data.name)[0] if trained.train_config else ""


class Sample:
    """A random sample of a split in batches, for commands that look at a trained model.

    Attributes:
        source: the sampled images.
    """

    def __init__(
        self,
        data: str,
        loaded: "Loaded",
        *,
        images: int,
        batch_size: int,
        split: str = "test",
    ):
        """Opens the data.

        Args:
            images: number of images; at most all of the split.
            split: if ``data`` names none.

        Raises:
            UsageError: as for ``open_data``; or a number is below 1.
        """
        from vmoe.data.problems import Unreadable
        from vmoe.data.sources import sample

        at_least(1).check(images=images, batch_size=batch_size)
        self._whole, replace = open_data(data, loaded, split=split)
        self._loaded, self._batch_size = loaded, batch_size
        self._left_out = Unreadable("left out")
        self._on_unreadable = self._left_out.add if replace else None
        self.source = sample(self._whole, images)

    def batches(self, at_most: int | None = None) -> "Iterator[tuple[Any, Any, Any]]":
        """Images, labels, and which are more than padding; see ``labelled_batches``.

        Args:
            at_most: number of images, if fewer than those of the sample.
        """
        from vmoe.data.sources import sample
        from vmoe.evaluate.routing import labelled_batches

        source = self.source
        if at_most is not None and at_most < len(source):
            source = sample(self._whole, at_most)
        return labelled_batches(
            self._loaded.model,
            source,
            self._loaded.preprocessing,
            batch_size=min(self._batch_size, len(source)),
            on_unreadable=self._on_unreadable,
        )

    @property
    def steps(self) -> int:
        """The number of batches."""
        return -(-len(self.source) // self._batch_size)

    def print_messages(self) -> None:
        """Prints what was skipped or left out, and how many images have no label."""
        from vmoe.data.sources import skipped_messages

        lines = [*skipped_messages([self.source]), *self._left_out.news()]
        images = len(self.source)
        if count := sum(not self.source.labels_of(i) for i in range(images)):
            what = "they count in no accuracy" if count > 1 else "it counts in no accuracy"
            lines.append(f"{count:,} of {images:,} images without a label: {what}")
        for line in lines:
            print(one_line(line), file=sys.stderr)
