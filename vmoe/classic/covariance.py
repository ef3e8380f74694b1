"""How sure the parameters of a mixture are: their covariance, the inverse of the information."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy.linalg import block_diag

from vmoe.classic.degenerate import empty_experts
from vmoe.classic.information import derivatives
from vmoe.classic.mixture import Mixture
from vmoe.classic.parameters import Block, blocks
from vmoe.classic.rows import Rows

LEAST = 1e-9  # the least information about a parameter, in its natural unit, per row
LOADED = 1e-6  # the squared part of a direction without information from which a parameter counts
FAR = 0.1  # standard errors between the fit and the maximum that are worth a note


@dataclass(frozen=True)
class Covariance:
    """The covariance of the parameters, for columns as they were given.

    Attributes:
        matrix: in the order of ``blocks``; NaN for parameters without an error.
        notes: why some have none, or all are off, one line each.
    """

    matrix: Float[np.ndarray, "c c"]
    notes: list[str]


def covariance(mixture: Mixture, rows: Rows) -> Covariance:
    """The inverse information, by the delta method for columns as they were given.

    With penalties it is Laplace's approximation: a penalty counts like rows. Parameters that the
    rows do not determine are left out, with a note, and the others' errors take them as known.
    """
    every = blocks(mixture)
    with np.errstate(all="ignore"):  # a note tells of numbers that are not finite
        gradient, information = derivatives(mixture, rows)
    units = np.concatenate([np.ones(0), *(block.units() for block in every)])
    fixed = np.concatenate([np.zeros(0, bool), *(block.fixed() for block in every)])
    per_row = information * np.outer(units, units) / rows.weight.sum()
    if not np.isfinite(per_row).all():
        note = "the information is not finite: targets are too far from what an expert predicts"
        return Covariance(np.full_like(information, np.nan), [note])
    kept, problem = _determined(per_row, ~fixed)
    notes = [problem] if problem else list(_notes(mixture, rows, every, fixed, kept))
    inverse = np.zeros_like(information)
    inverse[np.ix_(kept, kept)] = np.linalg.inv(per_row[np.ix_(kept, kept)])
    inverse *= np.outer(units, units) / rows.weight.sum()
    away = np.sqrt(gradient @ inverse @ gradient)
    if away > FAR:
        notes.append(
            f"the maximum for these rows is {away:.2g} standard errors away: give the rows and "
            "weights of the fit, and fit with a smaller tol and a larger max_iter"
        )
    change = block_diag(np.zeros((0, 0)), *(block.to_given(rows.view) for block in every))
    matrix = change @ inverse @ change.T
    unknown = (change != 0) @ ~kept
    matrix[unknown], matrix[:, unknown] = np.nan, np.nan
    return Covariance(matrix, notes)


def _determined(
    per_row: Float[np.ndarray, "c c"], free: Bool[np.ndarray, "c"]
) -> tuple[Bool[np.ndarray, "c"], str]:
    """Which of the free parameters the information determines; none, and why, at no maximum."""
    kept, nothing = free.copy(), np.zeros_like(free)
    while kept.any():
        values, vectors = np.linalg.eigh(per_row[np.ix_(kept, kept)])
        if values[0] < -LEAST:
            return nothing, (
                "these rows have no maximum of the log-likelihood here, and nothing has a standard "
                "error: give the rows and weights of the fit; fit with a smaller tol and a larger "
                "max_iter, from another start, or with fewer experts"
            )
        lacking = vectors[:, values < LEAST]
        if not lacking.size:
            break
        kept[np.flatnonzero(kept)[(lacking**2).sum(axis=1) > LOADED]] = False
    return kept, ""


def _notes(
    mixture: Mixture, rows: Rows, every: list[Block], fixed: np.ndarray, kept: np.ndarray
) -> Iterator[str]:
    """What has no error, and why."""
    empty = [f"expert {i}" for i in empty_experts(mixture, rows)]
    without = "no standard error, and the others take it as known"
    end = 0
    for block in every:
        here = slice(end, end := end + len(block.slope))
        if block.at_bound[: len(block.std)].any():
            yield f"{block.part}: std_ is at its least value, by variance_floor: {without}"
        if block.at_bound[len(block.std) :].any():
            yield f"{block.part}: df_ is at its bound, {block.df[0]:g}: {without}"
        if lost := int(np.sum(~kept[here] & ~fixed[here])):
            why = "two children are separable, or one has no rows"
            if not block.is_gate:
                why = "collinear columns, separable classes"
                if block.part in empty:
                    why = "it has less than one row"
            yield (
                f"{block.part}: these rows do not determine {lost} of its {here.stop - here.start} "
                f"parameters ({why}): {without}"
            )
