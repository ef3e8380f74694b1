"""Differences of means: one error over seeds and images, corrected tests, equality in a margin."""

import numpy as np
import pytest
import scipy.stats

from scripts.experiments.framework import differences
from scripts.prepare import emoji
from vmoe.analysis.statistics import standard_error


def right(seeds: int, images: int, rng: np.random.Generator, spread: float) -> np.ndarray:
    """Invented results (seeds, images) of models that find the same images hard."""
    ease = rng.normal(1.0, 1.0, images)
    of_seed = rng.normal(0.0, spread, (seeds, 1))
    return ease + of_seed + rng.normal(0.0, 0.5, (seeds, images)) > 0


def test_the_error_of_seeds_and_images_counts_their_interaction_once() -> None:
    """The oracle are the components of a table that is made of them."""
    rng = np.random.default_rng(0)
    s, n = 400, 500
    seeds, images = rng.normal(0, 0.3, (s, 1)), rng.normal(0, 2, (1, n))
    table = seeds + images + rng.normal(0, 1, (s, n))
    found = differences.crossed(table, np.zeros((s, n)), paired=True)
    parts = 0.3**2 / s + 2**2 / n + 1**2 / (s * n)
    assert found.error == pytest.approx(np.sqrt(parts), rel=0.1)
    assert found.mean == pytest.approx(table.mean())


def test_an_error_over_images_alone_is_that_of_the_paired_images() -> None:
    first, second = np.random.default_rng(1).random((2, 1, 300)) > ([[0.2]], [[0.3]])
    first, second = np.repeat(first, 3, 0), np.repeat(second, 3, 0)  # all seeds are one model
    found = differences.crossed(first, second, paired=False)
    assert found.error == pytest.approx(scipy.stats.sem(first[0] * 1.0 - second[0]))
    assert found.degrees == pytest.approx(299)


def test_an_error_over_seeds_alone_has_the_degrees_of_welch() -> None:
    first, second = [0.9, 0.8, 0.7], [0.5, 0.6, 0.55]
    found = differences.difference(first, second, paired=False)
    oracle = scipy.stats.ttest_ind(first, second, equal_var=False)
    assert (found.p, found.degrees) == pytest.approx((oracle.pvalue, oracle.df))
    of_pairs = differences.difference(first, second)
    assert of_pairs.p == pytest.approx(scipy.stats.ttest_rel(first, second).pvalue)
    assert differences.difference([0.9], [0.5]).p == 1
    alone = differences.crossed(np.eye(1, 4), np.eye(1, 4, 1), paired=True)
    assert (alone.mean, alone.error, alone.p) == (0, np.inf, 1)


@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize("paired", [False, True])
def test_models_that_do_not_differ_are_told_apart_in_few_draws(spread: float, paired: bool) -> None:
    rng = np.random.default_rng(2)
    clear = 0
    for _ in range(200):
        both = right(6, 200, rng, spread)
        clear += differences.crossed(both[:3], both[3:], paired=paired).clear
    assert clear <= 18  # 5% of 200, and two standard deviations


@pytest.mark.parametrize(
    ("seeds", "interaction", "images", "at_most"),
    [([1.0], 0.01, 0.1, 0.08), ([0.0, 1.0], 0.03, 0.03, 0.07)],
)
def test_three_seeds_err_as_often_as_the_rule_says(
    seeds: list[float], interaction: float, images: float, at_most: float
) -> None:
    """Normal figures, whose parts of the variance are estimated as by ``crossed``."""
    rng, draws = np.random.default_rng(0), 2000
    true = np.array(seeds) + interaction
    means = rng.normal(0, np.sqrt(true.sum() + images), draws)
    parts = np.maximum(true * rng.chisquare(2, (draws, len(true))) / 2, interaction)
    clear = [
        differences.tested(mean, [*((each, 2) for each in own), (images, np.inf)]).clear
        for mean, own in zip(means, parts, strict=True)
    ]
    assert 0.06 < np.mean(clear) < at_most + 2 * np.sqrt(at_most / draws)


def test_a_difference_that_is_clear_alone_may_not_be_among_many() -> None:
    one = {"a": differences.Difference(1.0, 0.4, 0.02)}
    others = {name: differences.Difference(0.1, 0.4, 0.8) for name in "bcd"}
    assert differences.corrected(one)["a"].clear
    assert not differences.corrected(one | others)["a"].clear
    assert differences.by_chance(1) == 0.05 < differences.by_chance(7) < 0.06


def test_drawings_that_are_alike_count_once() -> None:
    names = [f"test/Flags/{code}-{vendor}.png" for code in "abcd" for vendor in emoji.VENDORS]
    groups = emoji.emoji_of(names)
    values = np.repeat([1.0, 0.0, 1.0, 1.0], 2)  # both drawings of each emoji are right or wrong
    error = standard_error(values, np.array(groups))
    assert error == pytest.approx(scipy.stats.sem([1, 0, 1, 1]))
    others = emoji.emoji_of(["digits:test[0]", "digits:test[1]", "photos/smile-1.png"])
    assert len(set(others)) == 3
    apart = standard_error(values)
    assert apart == pytest.approx(scipy.stats.sem(values)) and apart < 0.7 * error
