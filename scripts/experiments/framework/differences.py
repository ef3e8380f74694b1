"""Differences of means, each with one standard error, and what they say.

Models of other seeds would differ in accuracy, and so would other test images. All models see the
same images, so seeds and images are crossed: the variance of a mean over both is the variance over
the seeds, plus that over the images, minus their interaction, which is in both. That is the
analysis of several readers of the same cases (Obuchowski & Rockette 1995; Hillis 2007).

Tests are t-tests. The degrees of freedom are those of Satterthwaite (1946): each part of the
variance counts with its own. Three seeds have only two, so a difference must be three to four times
an error that is mostly over seeds to be clear, and twice one that is mostly over images. This needs
no assumption that models of all kinds vary equally over the seeds. The seeds' part of the variance
is at least the interaction, which is in it and is well known, so that three seeds that agree by
chance do not make an error small. Tests at 5% with three seeds then err in at most 7% of simulated
draws if the interaction is at least as large as the images' part of the variance, as in all our
rows, and in up to 8% if it is smaller; a test repeats the worst of many sizes.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import scipy.special
import scipy.stats

LEVEL = 0.05
"""The p below which a test says something."""
POWER = 0.8
"""The share of repetitions that find a difference which a design calls found."""
Order = Literal["above", "none", "below"]
Key = TypeVar("Key")


class Difference(NamedTuple):
    """A mean difference.

    Attributes:
        error: its standard error; infinite for one seed.
        p: that of a two-sided t-test of 0, also after ``corrected``; 1 for one seed.
        degrees: the degrees of freedom of the error.
    """

    mean: float
    error: float
    p: float
    degrees: float = math.inf

    @property
    def clear(self) -> bool:
        """Whether p < ``LEVEL``."""
        return self.p < LEVEL

    @property
    def margin(self) -> float:
        """Half of the interval that has the true difference in 95% of all cases."""
        return self.error * float(scipy.stats.t.isf(LEVEL / 2, self.degrees))

    def found_from(self, level: float = LEVEL, sides: int = 2) -> float:
        """The smallest true difference that tests find in a share ``POWER`` of repetitions."""
        least = scipy.stats.t.isf(level / sides, self.degrees)
        return self.error * float(scipy.special.nctdtrinc(self.degrees, 1 - POWER, least))

    def p_above(self, bound: float) -> float:
        """That of the test whether the true difference is above a bound."""
        if not self.error:
            return float(self.mean <= bound)
        return float(scipy.stats.t.sf((self.mean - bound) / self.error, self.degrees))

    def p_below(self, bound: float) -> float:
        """That of the test whether the true difference is below a bound."""
        return self._replace(mean=-self.mean).p_above(-bound)


def tested(mean: float, parts: Iterable[tuple[float, float]]) -> Difference:
    """A difference whose variance is a sum of parts with their degrees of freedom."""
    parts = list(parts)
    variance = float(sum(variance for variance, _ in parts))
    uncertain = float(sum(each**2 / degrees for each, degrees in parts))
    degrees = variance**2 / uncertain if uncertain else math.inf
    found = Difference(float(mean), math.sqrt(variance), 1.0, degrees)
    return found._replace(p=min(1.0, 2 * min(found.p_above(0), found.p_below(0))))


def difference(
    first: Any,
    second: Any,
    *,
    paired: bool = True,
    images: float = 0.0,
    planned: Sequence[int] = (),
) -> Difference:
    """The mean of the first minus that of the second, over the seeds.

    Args:
        first: a figure of each seed.
        second: the same of another model.
        paired: whether a seed of both is one model, or trained on the same rows.
        images: the standard error over the images, or a bound of it, if it is known apart.
        planned: numbers of seeds for which the error is that of a plan, by the variances of these.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    mean = first.mean() - second.mean()
    layouts = [first - second] if paired else [first, second]
    if min(map(len, layouts)) < 2:
        return Difference(float(mean), math.inf, 1.0)
    numbers = planned or [len(each) for each in layouts]
    seeds = [(each.var(ddof=1) / s, s - 1) for each, s in zip(layouts, numbers, strict=False)]
    return tested(mean, [*seeds, (images**2, math.inf)])


def crossed(
    first: np.ndarray, second: np.ndarray, *, paired: bool, planned: Sequence[int] = ()
) -> Difference:
    """The mean of the first minus that of the second, over seeds and images (see above).

    Args:
        first: whether each image is predicted correctly, (seeds, images).
        second: the same of another model, on the same images.
        paired: whether a seed of both is one model.
        planned: as for ``difference``.
    """
    first, second = first.astype(float), second.astype(float)
    if min(map(len, (first, second))) < 2:
        return Difference(float(first.mean() - second.mean()), math.inf, 1.0)
    n = first.shape[1]
    images = float((first.mean(0) - second.mean(0)).var(ddof=1) / n)
    layouts, parts = [first - second] if paired else [first, second], []
    for each, number in zip(layouts, planned or map(len, layouts), strict=False):
        s = len(each)
        over_seeds = each.mean(1)
        rest = each - each.mean(0) - (over_seeds - each.mean())[:, None]
        interaction = float((rest**2).sum() / ((s - 1) * (n - 1)) / n)
        parts.append((max(float(over_seeds.var(ddof=1)), interaction) / number, number - 1))
        images -= interaction / s
    return tested(first.mean() - second.mean(), [*parts, (max(images, 0.0), n - 1)])


def corrected_p(p: Mapping[Key, float]) -> dict[Key, float]:
    """p corrected for the number of tests by the rule of Benjamini & Hochberg (1995)."""
    if not p:
        return {}
    adjusted = scipy.stats.false_discovery_control(list(p.values()))
    return dict(zip(p, map(float, adjusted), strict=True))


def corrected(found: Mapping[Key, Difference]) -> dict[Key, Difference]:
    """Differences whose p are corrected for their number; one without an error is no test."""
    tested = {key: each.p for key, each in found.items() if np.isfinite(each.error)}
    return dict(found) | {key: found[key]._replace(p=p) for key, p in corrected_p(tested).items()}


def by_chance(tests: int) -> float:
    """How many of the corrected tests of a page are clear, on average, if nothing has an effect.

    The limit for many independent tests (Finner & Roters 2002), and the level for one. Tests that
    share a model are clear together: seven that are correlated by a half have 0.08 instead of 0.06.
    """
    return LEVEL / (1 - LEVEL) ** 2 if tests > 1 else LEVEL * tests


def order(first: Sequence[float], second: Sequence[float]) -> Order:
    """Whether each of the first numbers is above, or below, each of the second."""
    pairs = list(itertools.product(first, second))
    if all(a > b for a, b in pairs):
        return "above"
    return "below" if all(a < b for a, b in pairs) else "none"


def p_value(p: float) -> str:
    """Three digits."""
    return f"{p:.3f}" if p >= 0.0005 else "< 0.001"


def signed(
    found: Difference,
    digits: int = 2,
    *,
    scale: float = 1.0,
    bound: bool = False,
    mark: bool = False,
) -> str:
    """A difference with its sign and its standard error, which is left out for one seed.

    Args:
        digits: after the point.
        scale: of the shown figures, such as 100 for percent.
        bound: whether the error is an upper bound.
        mark: shows a clear difference in bold.
    """
    text = f"{scale * found.mean:+.{digits}f}"
    if math.isfinite(found.error):
        text += f" ± {'at most ' * bound}{scale * found.error:.{digits}f}"
    return f"**{text}**" if mark and found.clear else text
