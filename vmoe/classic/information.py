"""The observed information of a mixture's whole log-likelihood.

The log-likelihood of a unit, which is a row or a group of rows, depends on the parameters through
log(prior_e density_e). With its responsibilities h_e, and the gradient s_e and the Hessian H_e of
this logarithm, its Hessian is (Louis 1982, section 3.2)

    sum_e h_e (H_e + s_e s_e^T) - (sum_e h_e s_e) (sum_e h_e s_e)^T.

H_e alone is what there would be to know if the expert of every unit were known; the rest is what is
lost because it is not. s_e and H_e of a group are sums over its rows, and follow by the chain rule
from the derivatives in each row's linear predictors: the logits of every gate, and for every expert
the predictor of each output and the logarithms of its standard deviations and degrees of freedom.
``gradient.objective`` is the same function for JAX, whose Hessian takes a second to compile.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.linalg import block_diag
from scipy.special import polygamma

from vmoe.classic.experts.interface import Experts
from vmoe.classic.experts.linear import Linear, residuals
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.experts.poisson import Poisson
from vmoe.classic.experts.student_t import StudentT, slope_in_df
from vmoe.classic.mixture import Mixture, parts
from vmoe.classic.parameters import Block, blocks
from vmoe.classic.partition import FixedGate
from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate, breadth_first, leaves

SLAB = 2**22  # numbers at once, which bounds the memory


def derivatives(
    mixture: Mixture, rows: Rows
) -> tuple[Float[np.ndarray, "c"], Float[np.ndarray, "c c"]]:
    """The gradient and the negative Hessian of the penalized log-likelihood, in all parameters.

    Their order is that of ``blocks``, with the logarithm of positive parameters.
    """
    every = blocks(mixture)
    gradient = -np.concatenate([np.zeros(0), *(block.slope for block in every)])
    information = block_diag(np.zeros((0, 0)), *(block.curvature for block in every))
    for slab in _slabs(rows, len(gradient) * mixture.experts.sizes.n_experts):
        _add(mixture, every, slab, gradient, information)
    return gradient, information


def _slabs(rows: Rows, width: int) -> Iterator[Rows]:
    """The rows in parts of whole units, with so many numbers for a row."""
    unit = np.arange(len(rows)) if rows.groups is None else rows.groups
    order = np.argsort(unit, kind="stable")
    step = max(1, SLAB // max(1, width))
    starts = np.searchsorted(unit[order], unit[order][::step])
    for here in np.split(order, np.unique(starts)[1:]):
        groups = None
        if rows.groups is not None:
            _, groups = np.unique(rows.groups[here], return_inverse=True)
        yield Rows(rows.view, rows.given[here], rows.y[here], rows.weight[here], groups)


def _add(
    mixture: Mixture, every: list[Block], rows: Rows, gradient: np.ndarray, information: np.ndarray
) -> None:
    """Adds the log-likelihood of some rows, by the formula of this module."""
    posterior, _ = mixture.posterior(rows)
    scores, end = np.zeros((*posterior.shape, len(gradient))), 0
    for block, (own, first, second) in zip(
        every, _in_predictors(mixture, rows, posterior), strict=True
    ):
        here = slice(end, end := end + len(block.slope))
        x, counts = (rows.gate, rows.share) if block.is_gate else (rows.expert, rows.weight)
        columns = [x] * len(block.coef) + [np.ones((len(rows), 1))] * len(block.positive)
        each = [first[..., [a]] * z[:, None] for a, z in enumerate(columns)]
        scores[:, own, here] = np.concatenate(each, axis=2)
        if rows.groups is not None:
            scores[..., here] *= counts[:, None, None]
        second *= counts[:, None, None]
        information[here, here] -= np.block(
            [
                [z.T @ (second[:, a, [b]] * t) for b, t in enumerate(columns)]
                for a, z in enumerate(columns)
            ]
        )
    weight = rows.weight
    if rows.groups is not None:
        _, of_each = np.unique(rows.groups, return_index=True)
        scores, posterior, weight = rows.sums(scores), posterior[of_each], np.ones(len(of_each))
    mean = np.einsum("ue,uec->uc", posterior, scores)
    gradient += weight @ mean
    information += (mean * weight[:, None]).T @ mean
    scores *= np.sqrt(weight[:, None] * posterior)[:, :, None]
    information -= np.tensordot(scores, scores, axes=((0, 1), (0, 1)))


def _in_predictors(
    mixture: Mixture, rows: Rows, posterior: Float[np.ndarray, "n e"]
) -> Iterator[tuple[Any, Float[np.ndarray, "n e c"], Float[np.ndarray, "n c c"]]]:
    """For each block, the experts whose s_e it is in, their s_e, and sum_e h_e H_e.

    They are derivatives in the linear predictors of the block.
    """
    if not isinstance(mixture.tree, FixedGate):
        for gate in breadth_first(mixture.tree):
            if len(gate.children) > 1:
                yield slice(None), *_of_gate(gate, rows, posterior)
    expert = 0
    for kind in parts(mixture):
        for e, (first, second) in enumerate(_of_experts(kind, rows), expert):
            yield [e], first[:, None], posterior[:, e, None, None] * second
        expert += kind.sizes.n_experts


def _of_gate(gate: TreeGate, rows: Rows, posterior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Those of a gate, which enters the prior of the experts below it alone."""
    p = np.exp(gate.log_probabilities(rows))[:, 1:]
    below = np.zeros((posterior.shape[1], len(gate.children)))
    for k, child in enumerate(gate.children):
        below[leaves(child), k] = 1
    reached = below.sum(axis=1)
    first = below[:, 1:] - reached[:, None] * p[:, None]
    return first, (posterior @ reached)[:, None, None] * _of_softmax(p)


def _of_softmax(p: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n k k"]:
    """The Hessian of the log probability of any outcome, in the logits."""
    return p[..., :, None] * p[..., None, :] - _diagonal(p)


def _diagonal(values: Float[np.ndarray, "*n k"]) -> Float[np.ndarray, "*n k k"]:
    return values[..., None] * np.eye(values.shape[-1])


def _of_experts(kind: Experts, rows: Rows) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The derivatives of each expert's log density: (n, c) and (n, c, c)."""
    if isinstance(kind, Linear):
        first, second = _of_noise(kind, rows)
    elif isinstance(kind, Poisson):
        rate = kind.means(rows)
        first, second = rows.y[:, None] - rate, -_diagonal(rate)
    elif isinstance(kind, Logistic) and kind.sizes.n_outputs > 1:
        p = kind.means(rows)[..., 1:]
        first = np.eye(kind.sizes.n_outputs)[rows.y][:, None, 1:] - p
        second = _of_softmax(p)
    else:  # nothing is to be estimated; estimators count as known
        return
    yield from zip(first.swapaxes(0, 1), second.swapaxes(0, 1), strict=True)


def _of_noise(kind: Linear, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Those of a location, the logarithm of a scale, and that of degrees of freedom.

    They follow from d log f / du at u = residual / scale.
    """
    u, std, q = residuals(rows, kind.coef) / kind.std, kind.std, kind.std.shape[1]
    pull, change, in_df = u, np.ones_like(u), []
    if isinstance(kind, StudentT):
        df = kind.df_[:, None]
        weight = (df + 1) / (df + u**2)
        pull, change = weight * u, weight * (df - u**2) / (df + u**2)
        if kind.df is None:
            in_df = list(_of_df(u, df))
    first = np.concatenate([pull / std, pull * u - 1, *in_df[:1]], axis=-1)
    second = np.zeros((*first.shape, first.shape[-1]))
    second[..., :q, :q] = _diagonal(-change / std**2)
    second[..., :q, q : 2 * q] = _diagonal(-(change * u + pull) / std)
    second[..., q : 2 * q, q : 2 * q] = _diagonal(-u * (change * u + pull))
    if in_df:
        _, curve, bend = in_df
        second[..., :q, -1], second[..., q:-1, -1] = bend / std, bend * u
        second[..., -1, -1:] = curve
    second += np.triu(second, 1).swapaxes(-1, -2)
    return first, second


def _of_df(u: np.ndarray, df: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The derivatives in the logarithm of degrees of freedom: two, and that of -d log f / du."""
    slope, tails = df * slope_in_df(u**2, df), u**2 / (df + u**2)
    trigamma = polygamma(1, (df + 1) / 2) - polygamma(1, df / 2)
    curve = slope + df**2 * trigamma / 4 + (1 + tails * ((df + 1) * tails - 2)) / 2
    bend = df * u * (u**2 - 1) / (df + u**2) ** 2
    return slope.sum(axis=-1, keepdims=True), curve.sum(axis=-1, keepdims=True), bend
