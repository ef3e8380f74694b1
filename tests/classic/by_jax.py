"""The penalized log-likelihood of a mixture by JAX, which has its gradient and its Hessian."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.nn import log_softmax
from jax.ops import segment_sum
from jax.scipy.special import gammaln, logsumexp
from jax.scipy.stats import norm
from jax.scipy.stats import t as student_t

from vmoe.classic.experts.interface import Experts
from vmoe.classic.experts.linear import Linear
from vmoe.classic.experts.logistic import Logistic
from vmoe.classic.experts.poisson import LARGEST
from vmoe.classic.experts.student_t import StudentT
from vmoe.classic.mixture import Mixture, parts
from vmoe.classic.multinomial import penalty_of
from vmoe.classic.partition import FixedGate
from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate, breadth_first


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
    """The parameters of a mixture.

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


def data_of(mixture: Mixture, rows: Rows) -> RowArrays:
    """The rows as arrays."""
    fixed = mixture.tree.log_probabilities(rows) if isinstance(mixture.tree, FixedGate) else None
    seen = rows.gate, rows.expert, rows.log_exposure
    each = RowArrays(*seen, rows.y, rows.weight, rows.share, rows.groups, fixed)
    return jax.tree.map(jnp.asarray, each)


def parameters(mixture: Mixture) -> Parameters:
    """What EM has found."""
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


def objective_of(mixture: Mixture, rows: Rows) -> float:
    """The penalized log-likelihood of weighted rows."""
    with jax.enable_x64(True):
        values = parameters(mixture), data_of(mixture, rows)
        return float(jax.jit(lambda v, data: objective(mixture, v, data))(*values))


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
