"""What to expect of a sparse last block, by the nearest of the measured data sets."""

import json
import math
from collections.abc import Iterator, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Literal, NamedTuple

import numpy as np

from vmoe.config import ViTConfig
from vmoe.studies.advise.measures import EXPERTS, Estimate, Measures

STORED = resources.files("vmoe.studies.advise").joinpath("reference.json")
LEVEL = 0.05
"""The corrected p below which a difference is clear."""
GAIN = 1.0
"""Points of accuracy: experts do not help if the interval excludes so much."""
FACTOR = 2.5
"""How many times more, or fewer, images or routed FLOPs than measured are still alike: no number
between those of the experiment is left out, as neighbors are at most five times apart."""
COMPARED = {"class_agreement": "class agreement", "spread": "spread"}
"""The measures that decide which data set is nearest, and what they are called."""
DRAWS = 1000
"""Draws of all measures within their errors."""
NEAR = 0.05
"""A data set counts if it is the nearest in this share of the draws."""
ROUTED = "share of the FLOPs that is routed"
Verdict = Literal["yes", "no", "not known"]


class Contrast(NamedTuple):
    """Accuracy of the MoEs that start as copies, minus that of a dense block of equal FLOPs.

    Attributes:
        images: number of training images.
        mean: the mean over the folds, in points, as are ``low`` and ``high``, the bounds of its
            95% interval, which is that of this difference alone.
        p: of its test, corrected for the number of tests of the experiment.
    """

    images: int
    mean: float
    low: float
    high: float
    p: float
    folds: int

    @property
    def verdict(self) -> Verdict:
        """Whether experts help: no if a gain of ``GAIN`` is excluded; yes if there is a clear one.

        A gain that is clear, but less than that, is a no.
        """
        if self.high < GAIN:
            return "no"
        return "yes" if self.low > 0 and self.p < LEVEL else "not known"

    @property
    def interval(self) -> str:
        """The mean and its interval, for a reader."""
        return f"{self.mean:+.1f} ({self.low:+.1f} to {self.high:+.1f})"


class DataSet(NamedTuple):
    """A data set of the experiment.

    Attributes:
        images: number of images in all.
        contrasts: by their number of training images.
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
        model: the dense model, for a reader.
        costs: "parameters", and "ms", milliseconds per image on a CPU, of the "sparse" block's
            experts and of the MLP of the "dense" block of equal FLOPs; empty if not measured.
    """

    date: str
    model: str
    data_sets: tuple[DataSet, ...]
    costs: dict[str, dict[str, float]]


class Advice(NamedTuple):
    """What to expect of experts instead of a dense block of equal FLOPs.

    Attributes:
        verdict: whether they help.
        reason: what the verdict is from, in words.
        nearest: by data set, the share of draws in which it is the nearest; empty if not known.
        found: by data set that may be the nearest, what was found there at the nearest number of
            images; empty if there is no evidence.
    """

    verdict: Verdict
    reason: str
    nearest: dict[str, float] = {}
    found: dict[str, Contrast] = {}


def read_reference(path: Traversable = STORED) -> Reference:
    """Reads a file such as the packaged one, with the figures of the experiment."""
    stored = json.loads(path.read_text())
    data_sets = []
    for each in stored["data_sets"]:
        measures, contrasts = each["measures"], each["contrasts"]
        estimates = {name: Estimate(**measures[name]) for name in COMPARED}
        each["measures"] = Measures(**measures | estimates)
        each["contrasts"] = tuple(Contrast(**one) for one in contrasts)
        data_sets.append(DataSet(**each))
    return Reference(**stored | {"data_sets": tuple(data_sets)})


def advise(config: ViTConfig, own: Measures, images: int, reference: Reference) -> Advice:
    """What to expect for some images.

    Args:
        config: the dense model, as it is to be trained; see ``measures.with_patch_mean``.
        own: the measures of the images.
        images: number of training images, at least 1.
    """
    if unknown := [label for name, label in COMPARED.items() if not getattr(own, name).known]:
        few = "too few images were read, or too few of a class"
        return Advice("not known", f"no evidence: {' and '.join(unknown)} not measured, as {few}")
    nearest = shares_nearest(own, reference.data_sets)
    near = [each for each in reference.data_sets if nearest[each.name] >= NEAR]
    if unlike := "; ".join(_unlike(config, own, images, near, reference.data_sets)):
        return Advice("not known", f"no evidence: {unlike}", nearest)
    found = {each.name: each.at(images) for each in near}
    verdicts = {each.verdict for each in found.values()}
    verdict = verdicts.pop() if len(verdicts) == 1 else "not known"
    meaning = {
        "yes": "there is a clear gain",
        "no": f"a gain of {GAIN:g} point is excluded",
        "not known": f"no gain is clear, but one of {GAIN:g} point is not excluded",
    }
    figures = [
        f"on {name} with {each.images:,} training images {meaning[each.verdict]}: accuracy, "
        f"sparse minus dense, {each.interval} points, corrected p {each.p:.2g}, {each.folds} folds"
        for name, each in found.items()
    ]
    return Advice(verdict, "; ".join(figures), nearest, found)


def shares_nearest(own: Measures, data_sets: Sequence[DataSet]) -> dict[str, float]:
    """In which share of random draws each data set is the nearest.

    All measures are drawn anew, from normal distributions with their errors. Near is a small
    distance in ``COMPARED``, each in standard deviations over the data sets.
    """
    every = [own, *(each.measures for each in data_sets)]
    estimates = np.array([[getattr(each, name) for name in COMPARED] for each in every])
    values, errors = np.moveaxis(estimates, -1, 0)
    drawn = np.random.default_rng(0).normal(values, errors, (DRAWS, *values.shape))
    apart = ((drawn[:, 1:] - drawn[:, :1]) / values[1:].std(0)) ** 2
    counts = np.bincount(apart.sum(-1).argmin(1), minlength=len(data_sets))
    return {each.name: int(n) / DRAWS for each, n in zip(data_sets, counts, strict=True)}


def _unlike(
    config: ViTConfig,
    own: Measures,
    images: int,
    near: Sequence[DataSet],
    data_sets: Sequence[DataSet],
) -> Iterator[str]:
    """What the experiment did not measure, each with the figures of both."""
    if config.pooling not in ("mean", "patch_mean"):
        yield f"pooling {config.pooling} (in the experiment the mean of the patches)"
    for name, label in COMPARED.items():
        values = [getattr(each.measures, name).value for each in data_sets]
        value, margin = getattr(own, name).value, np.std(values)
        if not min(values) - margin <= value <= max(values) + margin:
            measured = f"{min(values):.2f} to {max(values):.2f}"
            yield f"{label} {value:.2f} (in the experiment {measured})"
    routed = near[0].measures.routed  # all are of one model
    if not _near(own.routed, routed):
        yield f"{ROUTED} {own.routed:.1%} (in the experiment {routed:.1%})"
    for each in near:
        if not _near(images, each.at(images).images):
            yield f"{images:,} training images (of {each.name} {_sizes(each)} were measured)"


def table(
    own: Measures | None, images: int, reference: Reference, nearest: dict[str, float]
) -> tuple[list[str], list[list[str]]]:
    """The headings and rows of the measures, side by side."""
    data_sets = reference.data_sets
    every = [own, *(each.measures for each in data_sets)]
    ranges = ("0 to 1", f"1 to {EXPERTS}")
    rows = [
        [f"{label}, {limits}", *(_shown(getattr(each, name)) if each else "" for each in every)]
        for (name, label), limits in zip(COMPARED.items(), ranges, strict=True)
    ]
    if nearest:
        chances = [f"{nearest[each.name]:.0%}" for each in data_sets]
        rows.append(["nearest in these two, share of draws", "", *chances])
    rows.append([ROUTED, *(f"{each.routed:.1%}" if each else "" for each in every)])
    rows.append(["training images", f"{images:,}", *map(_sizes, data_sets)])
    found = [each.at(images) for each in data_sets]
    shown = [f"{each.interval}, {each.images:,} images" for each in found]
    rows.append(["accuracy, sparse minus dense, points", "", *shown])
    return ["", "yours", *(each.name for each in data_sets)], rows


def _shown(found: Estimate) -> str:
    return f"{found.value:.3f} ± {found.error:.3f}" if found.known else "not measured"


def _near(value: float, measured: float) -> bool:
    return measured / FACTOR <= value <= measured * FACTOR


def _sizes(data_set: DataSet) -> str:
    return ", ".join(f"{each.images:,}" for each in data_set.contrasts)
