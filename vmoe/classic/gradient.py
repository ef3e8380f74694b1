"""Training by gradient, end to end in JAX, for comparison with EM.

Jacobs et al. 1991 climb the log-likelihood of the whole mixture by its gradient. Here L-BFGS does,
on the same penalized log-likelihood as EM and from the same start. Only this module imports JAX.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.nn import log_softmax
from jax.ops import segment_sum
from jax.scipy.special import gammaln, logsumexp
from jax.scipy.stats import norm
from jax.scipy.stats import t as student_t
from jaxtyping import Float
from scipy.optimize import Bounds, minimize

from vmoe import forks
from vmoe.classic.em import Fit, Stopping
from vmoe.classic.experts.estimators import Estimators
from vmoe.classic.experts.interface import Experts
from vmoe.classic.experts.linear import Linear
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.experts.poisson import LARGEST
from vmoe.classic.experts.student_t import LEAST, MOST, StudentT
from vmoe.classic.mixture import Mixture, parts
from vmoe.classic.multinomial import penalty_of
from vmoe.classic.partition import FixedGate
from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate, breadth_first

STEPS = 10  # rises of so many steps are compared, since a single step of L-BFGS may be short


class RowArrays(NamedTuple):
    """The rows, as arrays that a compiled function takes.

    Attributes:
        gate: what the gates see (n, p).
        expert: what the experts see (n, p).
        log_exposure: the logarithm of the exposure (n,).
        y: targets (n, q), or the index of each row's class.
        weight: the weight of each row (n,).
        share: how much each row counts for the gates (n,).
        groups: the index of each row's group (n,); None without groups.
        fixed: the logarithm of the prior (n, e), if the gate is a given partition.
    """

    gate: Any
    expert: Any
    log_exposure: Any
    y: Any
    weight: Any
    share: Any
    groups: Any
    fixed: Any


class Parameters(NamedTuple):
    """What is trained.

    Attributes:
        gates: the coefficients of every gate, level by level, without its first child's zeros.
        experts: the coefficients (e, q, p) of every part of the experts.
        log_std: the logarithm of the standard deviation (e, q) of every part; None without noise.
        log_df: the logarithm of the degrees of freedom (e,) of every part; None if not estimated.
    """

    gates: list[Any]
    experts: list[Any]
    log_std: list[Any]
    log_df: list[Any]


def run(
    mixture: Mixture,
    rows: Rows,
    posterior: Float[np.ndarray, "n e"] | None,
    stopping: Stopping,
    history: Sequence[float] = (),
) -> Fit:
    """Fits the mixture in place, like ``em.run``; one M-step makes parameters of a posterior.

    The history has the penalized log-likelihood after every step of L-BFGS.
    """
    if any(isinstance(experts, Estimators) for experts in parts(mixture)):
        raise ValueError("solver='gradient' needs named experts")
    forks.computes()
    if posterior is not None:
        mixture.update(rows, posterior)
    fit = Fit(mixture, list(history))

    def stop(intermediate_result: Any) -> None:
        fit.history.append(-float(intermediate_result.fun))
        fit.converged = stopping.reached(fit.history[::-STEPS][::-1], float(rows.weight.sum()))
        if fit.converged:
            raise StopIteration

    with jax.enable_x64(True):
        start, unravel = ravel_pytree(parameters(mixture))
        data = data_of(mixture, rows)
        loss = jax.jit(jax.value_and_grad(lambda flat, d: -objective(mixture, unravel(flat), d)))
        options = {"maxiter": stopping.max_iter, "ftol": 0.0, "gtol": 0.0}
        found = minimize(
            loss,
            start,
            (data,),
            method="L-BFGS-B",
            jac=True,
            bounds=limits(mixture),
            callback=stop,
            options=options,
        )
        set_parameters(mixture, unravel(jnp.asarray(found.x)))
    fit.history = fit.history or [-float(found.fun)]
    fit.converged |= found.status != 1  # no step leads up any more, and not too many were tried
    fit.converged &= bool(np.isfinite(fit.history[-1]))
    return fit


def data_of(mixture: Mixture, rows: Rows) -> RowArrays:
    """The rows as arrays."""
    fixed = mixture.tree.log_probabilities(rows) if isinstance(mixture.tree, FixedGate) else None
    seen = rows.gate, rows.expert, rows.log_exposure
    each = RowArrays(*seen, rows.y, rows.weight, rows.share, rows.groups, fixed)
    return jax.tree.map(jnp.asarray, each)


def parameters(mixture: Mixture) -> Parameters:
    """The parameters of a mixture."""
    experts = parts(mixture)
    values = Parameters(
        gates=[gate.coef[1:] - gate.coef[0] for gate in breadth_first(mixture.tree)],
        experts=[kind.coef for kind in experts],
        log_std=[np.log(kind.std) if isinstance(kind, Linear) else None for kind in experts],
        log_df=[
            np.log(kind.df_) if isinstance(kind, StudentT) and kind.df is None else None
            for kind in experts
        ],
    )
    return jax.tree.map(jnp.asarray, values)


def limits(mixture: Mixture) -> Bounds:
    """The least and the largest values of the parameters."""
    free = jax.tree.map(lambda each: jnp.full(each.shape, jnp.inf), parameters(mixture))
    floors = [
        None if std is None else jnp.full(std.shape, 0.5 * jnp.log(kind.sizes.floor))
        for kind, std in zip(parts(mixture), free.log_std, strict=True)
    ]

    def bound(df: float) -> Any:
        return jax.tree.map(lambda each: jnp.full(each.shape, jnp.log(df)), free.log_df)

    least = jax.tree.map(jnp.negative, free)._replace(log_std=floors, log_df=bound(LEAST))
    most = free._replace(log_df=bound(MOST))
    return Bounds(*(ravel_pytree(each)[0] for each in (least, most)))


def set_parameters(mixture: Mixture, values: Parameters) -> None:
    """The reverse of ``parameters``."""
    for gate, coef in zip(breadth_first(mixture.tree), values.gates, strict=True):
        gate.coef = np.array(with_zeros(coef))
    for kind, coef, log_std, log_df in each_part(mixture, values):
        kind.coef = np.array(coef)
        if isinstance(kind, Linear):
            kind.std = np.exp(log_std)
        if log_df is not None:
            kind.df_ = np.clip(np.exp(log_df), LEAST, MOST)  # of rounding


def each_part(mixture: Mixture, values: Parameters) -> list[tuple[Any, Any, Any, Any]]:
    """The parts of the experts with their parameters."""
    return list(zip(parts(mixture), values.experts, values.log_std, values.log_df, strict=True))


def objective(mixture: Mixture, values: Parameters, data: RowArrays) -> jax.Array:
    """The penalized log-likelihood; of the mixture, only the structure and the settings count."""
    gates = dict(zip(map(id, breadth_first(mixture.tree)), values.gates, strict=True))
    prior = log_prior(mixture.tree, gates, data) if data.fixed is None else data.fixed
    each = each_part(mixture, values)
    density = jnp.concatenate([log_density(*expert, data) for expert in each], axis=1)
    penalty = sum(penalty_of(with_zeros(coef), mixture.gate_penalty) for coef in values.gates)
    penalty += sum(expert_penalty(kind, coef, log_std) for kind, coef, log_std, _ in each)
    if data.groups is not None:
        weighted = data.weight[:, None] * density
        density = segment_sum(weighted, data.groups, len(density))[data.groups]
    return data.share @ logsumexp(prior + density, axis=1) - penalty


def with_zeros(coef: jax.Array) -> jax.Array:
    """A gate's coefficients, with the zeros of its first child."""
    return jnp.pad(coef, ((1, 0), (0, 0)))


def log_prior(gate: TreeGate, coefs: dict[int, jax.Array], data: RowArrays) -> jax.Array:
    """``TreeGate.log_prior`` for these coefficients, which are found by the gate's identity."""
    own = log_softmax(data.gate @ with_zeros(coefs[id(gate)]).T, axis=1)
    each = [
        own[:, [k]] + (0.0 if isinstance(child, int) else log_prior(child, coefs, data))
        for k, child in enumerate(gate.children)
    ]
    return jnp.concatenate(each, axis=1)


def log_density(
    kind: Experts,
    coef: jax.Array,
    log_std: jax.Array | None,
    log_df: jax.Array | None,
    data: RowArrays,
) -> jax.Array:
    """``Experts.log_density`` (n, e) for these coefficients."""
    predictor = jnp.einsum("np,eqp->neq", data.expert, coef)
    if isinstance(kind, Logistic):
        return log_softmax(predictor)[jnp.arange(len(data.y)), :, data.y]
    y = data.y[:, None]
    if isinstance(kind, StudentT) and log_std is not None:
        df = kind.df_ if log_df is None else jnp.exp(log_df)
        each = student_t.logpdf(y, df[:, None], predictor, jnp.exp(log_std))
    elif log_std is not None:
        each = norm.logpdf(y, predictor, jnp.exp(log_std))
    else:
        log_rate = jnp.minimum(predictor + data.log_exposure[:, None, None], LARGEST)
        each = y * log_rate - jnp.exp(log_rate) - gammaln(y + 1)
    return each.sum(axis=-1)


def expert_penalty(kind: Experts, coef: jax.Array, log_std: jax.Array | None) -> Any:
    """``Experts.penalty`` for these coefficients."""
    if isinstance(kind, Logistic):
        return penalty_of(coef, kind.sizes.penalty)
    unit = 1.0 if log_std is None else jnp.exp(log_std)[..., None]
    return 0.5 * kind.sizes.penalty * jnp.sum((coef[..., 1:] / unit) ** 2)
