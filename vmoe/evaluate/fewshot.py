"""Few-shot evaluation: the accuracy of a linear probe on a model's features.

The features are the inputs of the model's last linear layer, after the pre-logits. The protocol
follows the V-MoE authors (arXiv 2106.05974): ``vmoe/evaluate/probe.py`` fits the probe, and for
each number of shots one L2 is chosen for all data sets, by the mean rank of its accuracies ON THE
TEST IMAGES. Accuracies are then comparable with the paper, but optimistic, most of all with a
single data set. ``choose_l2="train"`` chooses on training images that are not shots instead, since
most of the paper's data sets have no validation split. The authors prepare the images of all data
sets in the same way; the default here is the model's own (``FewShotConfig.preprocessing``).

The drawn images also depend on the order of the data, so the shots differ from the paper's. Under
a capacity the features depend on the batch, as in an evaluation. Labels of all images are read,
but pixels only of the shots and the test images. Images with several labels or none are excluded.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Array, Float, Int

from vmoe import distributed, models, passes
from vmoe.config.data import CHECKS, ImageChecks
from vmoe.config.fewshot import FewShotConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.pipeline import Batch, empty_batch
from vmoe.data.reading import READING, Reading
from vmoe.data.sources import Source, name_and_split, open_splits, relabel
from vmoe.data.sources.splits import NoSplit
from vmoe.data.sources.views import Subset
from vmoe.errors import UsageError
from vmoe.evaluate.metrics import check_finite
from vmoe.evaluate.probe import L2, Probe, choose_l2, draw, fit, place_in_class
from vmoe.nn.inputs import to_float
from vmoe.nn.vit import ViT

NONE = -1  # the label of excluded images


@dataclasses.dataclass(frozen=True, eq=False)
class FewShotData:
    """The images of a data set for a probe, as ``prepare`` returns them."""

    name: str
    """The name as the user gives it."""
    train: Source
    """The drawn images, class by class; fewer shots are the first images of each class."""
    train_labels: Int[np.ndarray, "b"]
    test: Source
    test_labels: Int[np.ndarray, "x"]
    num_classes: int
    messages: tuple[str, ...]
    """Remarks about the data for the user, one line each."""

    @property
    def sources(self) -> tuple[Source, Source]:
        """The images of both splits."""
        return self.train, self.test


def open_fewshot(config: FewShotConfig, checks: ImageChecks = CHECKS) -> tuple[FewShotData, ...]:
    """Opens the data sets of a config; reads labels, but no image.

    Raises:
        UsageError: there is no such data set or split; or as for ``prepare``.
    """
    opened = []
    for text in config.data:
        name, *splits = _name_and_splits(text)
        try:
            train, test = open_splits(name, splits, checks)
        except NoSplit as error:
            form = "NAME:TRAIN,TEST"
            error = UsageError(f"{error}; a probe needs two splits: name them as {form}")
            raise error.remedied_by(**{"data": form, "fewshot.data": form}) from None
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
        name: the name to show.
        train: the split from which the shots are drawn.
        test: the split to classify; ``train`` must have its classes.

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


@dataclasses.dataclass(frozen=True)
class FewShotResult:
    """The accuracies of the probes on the test images of each data set."""

    shots: tuple[int, ...]
    l2: tuple[float, ...]
    """The chosen L2 for each number of shots."""
    by_l2: dict[str, Float[np.ndarray, "x l"]]
    """By data set: the accuracy of each number of shots with each L2."""

    @property
    def accuracy(self) -> dict[str, list[float]]:
        """By data set: the accuracy of each number of shots with the chosen L2."""
        chosen = [L2.index(l2) for l2 in self.l2]
        rows = range(len(self.shots))
        return {name: table[rows, chosen].tolist() for name, table in self.by_l2.items()}

    @property
    def mean(self) -> list[float]:
        """The mean of these accuracies over the data sets."""
        return np.mean(list(self.accuracy.values()), axis=0).tolist()


def fewshot(
    model: ViT,
    data: Sequence[FewShotData],
    config: FewShotConfig,
    preprocessing: Preprocessing,
    reading: Reading = READING,
) -> FewShotResult:
    """Probes a model on data sets.

    Args:
        data: as ``open_fewshot`` opens it with the same config.
        preprocessing: the model's own, which is used unless the config has another one.
        reading: how the images are read, in batches of the config's size. ``on_batch`` is also
            called before each fit.

    Raises:
        UsageError: the image size is not a multiple of the patch size; no image of a split can be
            read; or no image is left to choose the L2.
        Failure: a feature is NaN or infinite.
    """
    preprocessing = config.prepare(preprocessing)
    reading = dataclasses.replace(reading, batch_size=config.batch_size)

    def features_of(
        source: Source, labels: Int[np.ndarray, "b"]
    ) -> tuple[Float[np.ndarray, "x r"], Int[np.ndarray, "x"]]:
        """Features and labels of all readable images, in order; the same on every process."""
        program = _features(model)
        measured = passes.measure(program, source, preprocessing, reading, model.placement)
        check_finite(measured.outputs, source.name, "features")
        return measured.outputs, labels[measured.indices]

    on_test, to_choose = {}, []
    for each in data:
        features, labels = features_of(each.train, each.train_labels)
        test = features_of(each.test, each.test_labels)
        place, probes = place_in_class(labels), []
        for count in config.shots:
            reading.on_batch()
            used = place < count
            probes.append(fit(features[used], labels[used], each.num_classes))
        on_test[each.name] = _accuracies(probes, *test)
        if config.choose_l2 == "test":
            to_choose.append(on_test[each.name])
            continue
        others = place >= max(config.shots)
        if not others.any():
            raise distributed.synchronized(
                UsageError(
                    f"every training image of {each.name} is a shot, so none is left to choose the "
                    "L2: use fewer shots, or choose_l2=test",
                    **{"fewshot.shots": config.shots, "fewshot.choose_l2": config.choose_l2},
                )
            )
        to_choose.append(_accuracies(probes, features[others], labels[others]))
    chosen = [choose_l2(accuracies) for accuracies in np.stack(to_choose, axis=1)]
    return FewShotResult(config.shots, tuple(L2[i] for i in chosen), on_test)


def _accuracies(
    probes: Sequence[Probe], features: Float[np.ndarray, "b r"], labels: Int[np.ndarray, "b"]
) -> Float[np.ndarray, "x l"]:
    """By probe and L2."""
    return np.array([[probe.accuracy(features, labels, l2) for l2 in L2] for probe in probes])


def check_fewshot(model: ViT, config: FewShotConfig, preprocessing: Preprocessing) -> None:
    """Traces the program of ``fewshot``, which then reuses the trace. Allocates no array.

    Args:
        model: its parameters may be ``jax.ShapeDtypeStruct``.
        preprocessing: the model's own.

    Raises:
        UsageError: the capacity leaves no slot.
    """
    b = model.placement.round_up(config.batch_size)
    batch = empty_batch(b, 1, config.prepare(preprocessing))
    models.shapes_of(_features(model), batch)


@models.compiled
def _features(model: ViT, batch: Batch) -> tuple[Float[Array, "b r"], None]:
    model.head.classes = None  # the head then returns its inputs
    features, _ = model.forward(to_float(batch.images), valid=batch.valid)
    return model.placement.replicate(features), None
