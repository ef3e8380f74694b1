"""Which images a few-shot probe reads: the shots of every class, and the test images.

Labels are read of all images, pixels only of those that are needed. Images with several labels or
none are excluded.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

from vmoe.config.data import Check, OnError
from vmoe.config.fewshot import FewShotConfig
from vmoe.data.sources import Source, name_and_split, one_walk, open_source, relabel
from vmoe.data.sources.views import Subset
from vmoe.errors import UsageError
from vmoe.evaluate.probe import draw

NONE = -1  # in place of the label of an image that is excluded


@dataclasses.dataclass(frozen=True, eq=False)
class FewShotData:
    """The images of a data set that a probe reads; ``prepare`` makes one."""

    name: str
    """As the user gives it."""
    train: Source
    """The drawn images, class by class, those of a smaller number of shots first."""
    train_labels: Int[np.ndarray, "b"]
    test: Source
    test_labels: Int[np.ndarray, "x"]
    num_classes: int
    messages: tuple[str, ...]
    """A line for each thing that the user should know about the data."""

    @property
    def sources(self) -> tuple[Source, Source]:
        """The images of both splits."""
        return self.train, self.test


@one_walk()
def open_fewshot(
    config: FewShotConfig, *, check: Check = "headers", on_error: OnError = "fail"
) -> tuple[FewShotData, ...]:
    """Opens the data sets of a config; reads labels, but no image.

    Args:
        check, on_error: as for ``open_source``.

    Raises:
        UsageError: there is no such data set or split; or as for ``prepare``.
    """
    opened = []
    for text in config.data:
        name, *splits = _name_and_splits(text)
        train, test = (open_source(name, split, check=check, on_error=on_error) for split in splits)
        opened.append(prepare(text, train, test, config))
    return tuple(opened)


def _name_and_splits(text: str) -> tuple[str, str, str]:
    """Parses NAME or NAME:TRAIN,TEST.

    >>> _name_and_splits("digits"), _name_and_splits("folder:a,b:train,validation")
    (('digits', 'train', 'test'), ('folder:a,b', 'train', 'validation'))
    """
    whole, _, test = text.rpartition(",")
    name, train = name_and_split(whole)
    if train:
        return name, train, test
    name, split = name_and_split(text)
    if split:
        raise UsageError(
            f"a probe needs two splits, such as {name}:train,{split}; or give {name} for train and "
            "test",
            **{"fewshot.data": text},
        )
    return name, "train", "test"


def prepare(name: str, train: Source, test: Source, config: FewShotConfig) -> FewShotData:
    """Draws the shots of a data set.

    Args:
        name: for people.
        train: from which the shots are drawn.
        test: its classes must be among those of ``train``.

    Raises:
        UsageError: a split has no image with exactly one label, or the test split has a class that
            the training split does not have.
    """
    test = relabel(test, train.class_names)
    labels, of_test = _labels(train), _labels(test)
    classes = len(train.class_names)
    drawn = draw(labels, classes, config.images_per_class, config.seed)
    tested = np.flatnonzero(of_test != NONE)
    for source, images in ((train, drawn), (test, tested)):
        if not len(images):
            raise UsageError(f"{source.name}: no image has exactly one label")
    return FewShotData(
        name,
        Subset(train, drawn),
        labels[drawn],
        test if len(tested) == len(test) else Subset(test, tested),
        of_test[tested],
        classes,
        tuple(_messages(name, labels, of_test, classes, config)),
    )


def _labels(source: Source) -> Int[np.ndarray, "b"]:
    """The label of every image."""
    every = (source.labels_of(i) for i in range(len(source)))
    return np.array([labels[0] if len(labels) == 1 else NONE for labels in every], np.int32)


def _messages(
    name: str,
    train: Int[np.ndarray, "b"],
    test: Int[np.ndarray, "x"],
    num_classes: int,
    config: FewShotConfig,
) -> Iterator[str]:
    for what, labels in (("training", train), ("test", test)):
        if excluded := int((labels == NONE).sum()):
            yield (
                f"{name}: {excluded:,} of {len(labels):,} {what} images are excluded from the "
                "probe: they have several labels, or none"
            )
    counts = np.bincount(train[train != NONE], minlength=num_classes)
    if short := int((counts < max(config.shots)).sum()):
        yield (
            f"{name}: {short:,} of {num_classes:,} classes have fewer than {max(config.shots)} "
            "training images; the probe uses all that they have"
        )
