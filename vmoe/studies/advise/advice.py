"""What to expect of a sparse last block, by the nearest of the measured data sets."""

import json
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal, NamedTuple

import numpy as np

from vmoe.config import ViTConfig
from vmoe.studies.advise.measures import EXPERTS, Measures

STORED = resources.files("vmoe.studies.advise").joinpath("reference.json")
LEVEL = 0.05
"""The corrected p below which a difference is a verdict."""
FACTOR = 2.5
"""How many times more, or fewer, images or routed FLOPs than measured are still alike: no number
between those that the experiment measures, of which each is five times another, is left out."""
COMPARED = {
    "groups": ("groups: information of clusters about the class, 0 to 1", ".2f"),
    "spread": (f"spread: clusters of an image's patches, 1 to {EXPERTS}", ".2f"),
}
"""What is near: the measures of images, in words with their units, and the format of a value."""
ROUTED = "share of the FLOPs that is routed"


class Contrast(NamedTuple):
    """Accuracy of the MoEs that start as copies, minus that of a dense block of equal FLOPs.

    Attributes:
        images: number of training images.
        mean: the mean over the folds, in points, as are ``error``, its standard error, and ``low``
            and ``high``, the bounds of its 95% interval.
        p: of its test, corrected for the number of tests of the experiment.
    """

    images: int
    mean: float
    error: float
    low: float
    high: float
    p: float
    folds: int


class DataSet(NamedTuple):
    """A data set of the experiment.

    Attributes:
        images: number of images in all.
        contrasts: by their number of training images; empty before they are measured.
    """

    name: str
    images: int
    measures: Measures
    contrasts: tuple[Contrast, ...]

    def at(self, images: int) -> Contrast:
        """The contrast whose number of training images is nearest, by the ratio."""
        return min(self.contrasts, key=lambda each: abs(math.log(each.images / images)))


class Reference(NamedTuple):
    """What was measured.

    Attributes:
        date: when it was written, YYYY-MM-DD.
        model: the dense model, in words.
    """

    date: str
    model: str
    data_sets: tuple[DataSet, ...]


class Advice(NamedTuple):
    """What to expect of experts instead of a dense block of equal FLOPs.

    Attributes:
        verdict: whether they are better.
        reason: what the verdict is from, as a sentence.
        nearest: the data set that is nearest; None if that is not known.
        contrast: what was found there, at the nearest number of images; None if there is none.
    """

    verdict: Literal["yes", "no", "not known"]
    reason: str
    nearest: str | None = None
    contrast: Contrast | None = None


def read_reference(path: Traversable = STORED) -> Reference:
    """Reads a file such as the packaged one, with the figures of the experiment."""
    stored = json.loads(path.read_text())
    data_sets = [
        DataSet(
            each["name"],
            each["images"],
            Measures(**each["measures"]),
            tuple(Contrast(**one) for one in each["contrasts"]),
        )
        for each in stored["data_sets"]
    ]
    return Reference(stored["date"], stored["model"], tuple(data_sets))


def advise(own: Measures | None, images: int, reference: Reference) -> Advice:
    """What to expect for some images.

    Args:
        own: their measures; None without a model.
        images: number of training images, at least 1.
    """
    if own is None:
        return Advice("not known", "groups and spread are measured with a dense model only")
    if not reference.data_sets:
        return Advice("not known", "the table of the experiment has no data set yet")
    apart = distances(own, reference.data_sets)
    like = min(reference.data_sets, key=lambda each: apart[each.name])
    if unlike := "; ".join(_unlike(own, images, like, reference.data_sets)):
        return Advice("not known", f"no evidence: {unlike}", like.name)
    if not like.contrasts:
        reason = f"the table of the experiment has no rows of the nearest, {like.name}, yet"
        return Advice("not known", reason, like.name)
    found = like.at(images)
    reason = (
        f"on {like.name}, {found.images:,} images, experts minus a dense block of equal FLOPs are "
        f"{found.mean:+.1f} points of accuracy (95% interval {found.low:+.1f} to "
        f"{found.high:+.1f}, corrected p {found.p:.2g}, {found.folds} folds)"
    )
    verdict = "not known" if found.p >= LEVEL else "yes" if found.mean > 0 else "no"
    return Advice(verdict, reason, like.name, found)


def distances(own: Measures, data_sets: Sequence[DataSet]) -> dict[str, float]:
    """How far the images of each data set are, in standard deviations over the data sets."""
    scales = _scales(data_sets)
    return {
        each.name: math.hypot(
            *((getattr(own, x) - getattr(each.measures, x)) / scales[x] for x in COMPARED)
        )
        for each in data_sets
    }


def _unlike(
    own: Measures, images: int, like: DataSet, data_sets: Sequence[DataSet]
) -> Iterator[str]:
    """What was not measured: outside of all data sets by more than their standard deviation."""
    scales = _scales(data_sets)
    for name, (words, form) in COMPARED.items():
        values = [getattr(each.measures, name) for each in data_sets]
        value, least, most = getattr(own, name), min(values), max(values)
        if not least - scales[name] <= value <= most + scales[name]:
            word = words.partition(":")[0]
            yield f"{word} {value:{form}} (in the experiment {least:{form}} to {most:{form}})"
    if not _near(own.routed, like.measures.routed):
        yield f"{ROUTED} {own.routed:.1%} (in the experiment {like.measures.routed:.1%})"
    if like.contrasts and not _near(images, like.at(images).images):
        sizes = _listed(like)
        yield f"{images:,} images to train on (of {like.name} {sizes} were measured)"


def described(config: ViTConfig) -> str:
    """What decides how a model compares with that of the experiment, in words."""
    patches = (config.image_size // config.patch_size) ** 2
    pooled = "the class token" if config.pooling == "class_token" else "the patches"
    size = f"{config.depth} blocks of width {config.width}, {patches:,} patches"
    return f"{size}, the head reads {pooled}"


def table(
    own: Measures | None, images: int, reference: Reference, nearest: str | None
) -> tuple[list[str], list[list[str]]]:
    """The headings and rows of the measures, side by side."""
    data_sets = reference.data_sets
    names = [each.name + " (nearest)" * (each.name == nearest) for each in data_sets]
    every = [own, *(each.measures for each in data_sets)]
    shown = {**COMPARED, "routed": (ROUTED, ".1%")}
    rows = [
        [words, *(format(getattr(each, name), form) if each else "" for each in every)]
        for name, (words, form) in shown.items()
    ]
    if own:
        apart = distances(own, data_sets).values()
        distance = "distance in groups and spread, standard deviations"
        rows.insert(len(COMPARED), [distance, "", *(f"{each:.1f}" for each in apart)])
    sizes = [_listed(each) or "none yet" for each in data_sets]
    found = [each.at(images) if each.contrasts else None for each in data_sets]
    points = [f"{x.mean:+.1f} ± {x.error:.1f} ({x.images:,})" if x else "" for x in found]
    rows.append(["images to train on", f"{images:,}", *sizes])
    if any(points):
        rows.append(["experts minus dense, points of accuracy (images)", "", *points])
    return ["", "yours", *names], rows


def _near(value: float, measured: float) -> bool:
    return measured / FACTOR <= value <= measured * FACTOR


def _listed(data_set: DataSet) -> str:
    return ", ".join(f"{each.images:,}" for each in data_set.contrasts)


def _scales(data_sets: Sequence[DataSet]) -> dict[str, float]:
    """The standard deviation over the data sets; 1 if there is none."""
    every = {name: [getattr(each.measures, name) for each in data_sets] for name in COMPARED}
    return {name: float(np.std(values or [0])) or 1.0 for name, values in every.items()}
