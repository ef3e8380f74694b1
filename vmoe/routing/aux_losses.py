"""Auxiliary losses of routing, one value per group.

Padding is ignored. The total of a block is the weighted sum, averaged over the groups that have a
token other than padding; the caller sums over the blocks.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.axes import RouterInputs
from vmoe.fields import Checked, NonNegative
from vmoe.routing.top_k import top_k

GroupLoss = Float[Array, "g"]


@dataclasses.dataclass(frozen=True)
class AuxLossWeights(Checked):
    """Weights of the auxiliary losses of one MoE layer."""

    section = "model.moe.router.aux_loss"

    importance: NonNegative = 0.005
    """Weight of the importance loss: the squared coefficient of variation of the experts' summed
    gates (V-MoE, appendix A)."""
    load: NonNegative = 0.005
    """Weight of the load loss: the same for the experts' smoothed loads; only in training with
    noise."""
    gshard: NonNegative = 0.0
    """Weight of GShard's loss: the product of first-choice shares and mean gates (arXiv
    2006.16668)."""
    z: NonNegative = 0.0
    """Weight of the z loss of ST-MoE: the mean squared log-partition of the router logits (arXiv
    2202.08906)."""


NO_LOSSES = AuxLossWeights(importance=0.0, load=0.0)
BALANCING = ("importance", "load", "gshard")
"""The losses that balance the load of experts."""


def losses(
    weights: AuxLossWeights,
    inputs: RouterInputs,
    noisy: Float[Array, "g s e"],
    gates: Float[Array, "g s e"],
    *,
    k: int,
    noise_std: float,
) -> dict[str, GroupLoss]:
    """The losses whose weight is not 0, by name, unweighted; without noise there is no load loss.

    Args:
        gates: the gates that the routing used.
        k: choices of each token.
        noise_std: e times the standard deviation of the noise, unless the gate determines it.
    """
    (logits, noise, valid), own_std = inputs[:3], inputs.noise_std
    result = {}
    if weights.importance:
        result["importance"] = importance(jax.nn.softmax(logits, axis=-1), valid)
    if weights.load and noise is not None and (own_std is not None or noise_std > 0):
        scale = logits.shape[-1] / noise_std if own_std is None else 1 / own_std
        result["load"] = load(logits, noisy, valid, k=k, scale=scale)
    if weights.gshard:
        result["gshard"] = gshard(gates, valid)
    if weights.z:
        result["z"] = z(logits, valid)
    return result


def total(
    losses: dict[str, GroupLoss], weights: AuxLossWeights, valid: Bool[Array, "g s"]
) -> Float[Array, ""]:
    """The weighted sum of the losses, averaged over the groups that have a token.

    A loss that has no weight here, of a router of your own, has weight 1.
    """
    weighted = sum(
        (getattr(weights, name, 1.0) * loss for name, loss in losses.items()),
        jnp.zeros((), jnp.float32),
    )
    real = valid.any(axis=1)
    return jnp.where(real, weighted, 0.0).sum() / jnp.maximum(real.sum(), 1)


def importance(gates: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> GroupLoss:
    """CV^2 over the experts of their summed gates (V-MoE, appendix A, equation 7).

    Args:
        gates: softmax of the logits without noise.
    """
    return _squared_variation(jnp.where(valid[..., None], gates, 0.0).sum(axis=1))


def load(
    logits: Float[Array, "g s e"],
    noisy: Float[Array, "g s e"],
    valid: Bool[Array, "g s"],
    *,
    k: int,
    scale: Float[Array, "g s e"] | float,
) -> GroupLoss:
    """CV^2 over the experts of their smoothed loads (V-MoE, appendix A, equation 10).

    A token's load on an expert is the probability that the expert's logit, with new noise of
    standard deviation 1 / scale, exceeds the token's k-th largest noisy logit.
    """
    threshold = top_k(noisy, k)[0][..., -1:]
    chosen = 1.0 - jax.scipy.stats.norm.cdf((threshold - logits) * scale)
    return _squared_variation(_mean(chosen, valid))


def gshard(gates: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> GroupLoss:
    """e^2 times the mean over experts of first-choice share x mean gate (arXiv 2006.16668).

    It is 1 if both are uniform, and e if one expert gets all tokens.
    """
    e = gates.shape[-1]
    first = jax.nn.one_hot(gates.argmax(axis=-1), e, dtype=gates.dtype)
    return e**2 * (_mean(first, valid) * _mean(gates, valid)).mean(axis=-1)


def z(logits: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> GroupLoss:
    """Mean squared log-partition of the logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return _mean(jax.nn.logsumexp(logits, axis=-1, keepdims=True) ** 2, valid)[..., 0]


def _mean(values: Float[Array, "g s x"], valid: Bool[Array, "g s"]) -> Float[Array, "g x"]:
    count = jnp.maximum(valid.sum(axis=1), 1)[:, None]
    return jnp.where(valid[..., None], values, 0.0).sum(axis=1) / count


def _squared_variation(values: Float[Array, "g e"]) -> GroupLoss:
    """Variance over squared mean; not (std / mean)^2, whose gradient is NaN at perfect balance."""
    # A group of only padding has mean 0: its loss and its gradient are 0.
    mean = values.mean(axis=-1)
    return values.var(axis=-1) / jnp.where(mean > 0, mean, 1.0) ** 2
