"""The observed information of a mixture's whole log-likelihood.

A row's log-likelihood depends on the parameters through its linear predictors: the logits of every
gate, and for every expert the predictor of each output and the logarithm of its standard deviation.
With the responsibilities h_e, and the gradient s_e and the Hessian H_e of log(prior_e density_e) in
the predictors, its Hessian is (Louis 1982, section 3.2)

    sum_e h_e (H_e + s_e s_e^T) - (sum_e h_e s_e) (sum_e h_e s_e)^T.

H_e alone is what there would be to know if the expert of every row were known; the rest is what is
lost because it is not. The predictors are linear in the parameters, and the chain rule does the
rest. Degrees of freedom of Student t experts count as known, also if they were estimated.
``gradient.objective`` is the same function for JAX, whose Hessian takes a second to compile.
"""

import itertools

import numpy as np
from jaxtyping import Float
from scipy.linalg import block_diag

from vmoe.classic.experts.interface import Experts
from vmoe.classic.experts.linear import Linear, residuals
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.experts.poisson import Poisson
from vmoe.classic.experts.student_t import StudentT
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

    Their order is that of ``blocks``, with the logarithm of standard deviations.
    """
    every = blocks(mixture)
    gradient = -np.concatenate([np.zeros(0), *(block.slope for block in every)])
    information = block_diag(np.zeros((0, 0)), *(block.curvature for block in every))
    predictors = sum(len(block.coef) + block.std.size for block in every)
    step = max(1, SLAB // max(1, predictors * len(gradient)))
    for i in range(0, len(rows) if predictors else 0, step):
        here = slice(i, i + step)
        slab = Rows(rows.view, rows.given[here], rows.y[here], rows.weight[here])
        _add(mixture, every, slab, gradient, information)
    return gradient, information


def _add(
    mixture: Mixture, every: list[Block], rows: Rows, gradient: np.ndarray, information: np.ndarray
) -> None:
    """Adds the log-likelihood of some rows, by the formula of this module."""
    posterior, _ = mixture.posterior(rows)
    first, second = _in_predictors(mixture, rows, posterior)
    mean = np.einsum("ne,nea->na", posterior, first)
    weighted = (first * posterior[:, :, None]).transpose(0, 2, 1)
    second += weighted @ first - mean[:, :, None] * mean[:, None]
    mean *= rows.weight[:, None]
    second *= rows.weight[:, None, None]
    groups = _groups(every, rows)
    for x, predictors, places in groups:
        gradient[places] += (mean[:, predictors].T @ x).ravel()
    for (x, a, at), (z, b, to) in itertools.product(groups, repeat=2):
        each = np.tensordot(x, second[:, a][:, :, b, None] * z[:, None, None], axes=(0, 0))
        information[np.ix_(at, to)] -= each.swapaxes(0, 1).reshape(len(at), len(to))


def _groups(every: list[Block], rows: Rows) -> list[tuple[np.ndarray, list[int], list[int]]]:
    """The predictors by what they see: its columns, their numbers, and where parameters stand."""
    ones = np.ones((len(rows), 1))
    found: dict[str, tuple[list[int], list[int]]] = {
        "gate": ([], []),
        "expert": ([], []),
        "": ([], []),
    }
    predictor = parameter = 0
    for block in every:
        kinds = ["gate" if block.is_gate else "expert"] * len(block.coef) + [""] * block.std.size
        for kind in kinds:
            width = block.coef.shape[1] if kind else 1
            found[kind][0].append(predictor)
            found[kind][1].extend(range(parameter, parameter + width))
            predictor, parameter = predictor + 1, parameter + width
    return [
        (getattr(rows, kind) if kind else ones, *numbers)
        for kind, numbers in found.items()
        if numbers[0]
    ]


def _in_predictors(
    mixture: Mixture, rows: Rows, posterior: Float[np.ndarray, "n e"]
) -> tuple[Float[np.ndarray, "n e c"], Float[np.ndarray, "n c c"]]:
    """The gradients s_e in all linear predictors, and sum_e h_e H_e."""
    pieces = []
    if not isinstance(mixture.tree, FixedGate):
        pieces = [_gate(gate, rows, posterior) for gate in breadth_first(mixture.tree)]
    start, (n, experts) = 0, posterior.shape
    for kind in parts(mixture):
        for first, second in zip(*_of_kind(kind, rows), strict=True):
            own = np.zeros((n, experts, first.shape[1]))
            own[:, start] = first
            pieces.append((own, posterior[:, start, None, None] * second))
            start += 1
    width = sum(first.shape[2] for first, _ in pieces)
    whole, at = np.zeros((n, width, width)), 0
    for _, second in pieces:
        end = at + second.shape[1]
        whole[:, at:end, at:end] = second
        at = end
    return np.concatenate([first for first, _ in pieces], axis=2), whole


def _gate(gate: TreeGate, rows: Rows, posterior: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The pieces of a gate, which enters the prior of the experts below it alone."""
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


def _of_kind(kind: Experts, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """The derivatives of each expert's log density: (e, n, c) and (e, n, c, c)."""
    if isinstance(kind, Linear):
        first, second = _of_noise(kind, rows)
    elif isinstance(kind, Poisson):
        rate = kind.means(rows)
        first, second = rows.y[:, None] - rate, -_diagonal(rate)
    elif isinstance(kind, Logistic):
        p = kind.means(rows)[..., 1:]
        first = np.eye(kind.sizes.n_outputs)[rows.y][:, None, 1:] - p
        second = _of_softmax(p)
    else:  # estimators, which count as known
        shape = (len(rows), kind.sizes.n_experts)
        first, second = np.zeros((*shape, 0)), np.zeros((*shape, 0, 0))
    return first.swapaxes(0, 1), second.swapaxes(0, 1)


def _of_noise(kind: Linear, rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Those of a location and the logarithm of a scale, by d log f / du at u = residual / scale."""
    u, std, q = residuals(rows, kind.coef) / kind.std, kind.std, kind.std.shape[1]
    if isinstance(kind, StudentT):
        df = kind.df_[:, None]
        weight = (df + 1) / (df + u**2)
        pull, change = weight * u, weight * (df - u**2) / (df + u**2)
    else:
        pull, change = u, np.ones_like(u)
    crossed = _diagonal(-(change * u + pull) / std)
    second = np.zeros((*u.shape[:2], 2 * q, 2 * q))
    second[..., :q, :q] = _diagonal(-change / std**2)
    second[..., :q, q:], second[..., q:, :q] = crossed, crossed
    second[..., q:, q:] = _diagonal(-u * (change * u + pull))
    return np.concatenate([pull / std, pull * u - 1], axis=2), second
