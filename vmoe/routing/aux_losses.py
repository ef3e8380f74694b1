"""Auxiliary losses of routing, one value per group.

Padding is ignored. The total of a block is the weighted sum, averaged over the groups that have a
token other than padding; the caller sums over the blocks.

A loss that balances the load is a function of sums over tokens. With ``over="group"`` the tokens
are those of a group, and the loss is computed with the routing. Else the router returns the sums of
each group, the layer adds them up, and ``losses_of_sums`` makes one loss of them.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Shaped

from vmoe.axes import RouterInputs
from vmoe.fields import Checked, NonNegative
from vmoe.routing.top_k import top_k

GroupLoss = Float[Array, "g"]
Over = Literal["group", "device", "batch"]
"""The tokens over which a loss balances the load."""


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
    over: Over = "group"
    """The tokens over which importance, load and gshard balance the experts. group: those of a
    group; device: all tokens of a device, the micro-batch of arXiv 2501.11873; batch: all tokens of
    all devices, its global batch. With gradient accumulation each part of the batch has losses of
    its own."""


NO_LOSSES = AuxLossWeights(importance=0.0, load=0.0)
BALANCING = ("importance", "load", "gshard")
"""The losses that balance the load of experts."""


def losses_and_sums(
    weights: AuxLossWeights,
    inputs: RouterInputs,
    noisy: Float[Array, "g s e"],
    gates: Float[Array, "g s e"],
    *,
    k: int,
    noise_std: float,
    shares: Sequence[float] = (),
) -> tuple[dict[str, GroupLoss], dict[str, Float[Array, "g e"]]]:
    """The losses of groups, unweighted, and what ``losses_of_sums`` needs of each group, by name.

    Those whose weight is 0 are left out; load needs noise.

    Args:
        gates: the gates that the routing used.
        k: choices of each token.
        noise_std: e times the standard deviation of the noise, unless the gate determines it.
        shares: the relative load that each expert is to have, the same if empty. With them the
            first two losses are those of an expert's sum divided by its share, and a term of gshard
            is multiplied by the smallest share / its expert's (MoE++, equation 7, arXiv
            2410.07348, which counts all choices where GShard's loss counts the first).
    """
    logits, valid, losses, sums = inputs.logits, inputs.valid, {}, {}
    of_groups = weights.over == "group"
    if weights.importance:
        clean = jax.nn.softmax(logits, axis=-1)
        if of_groups:
            losses["importance"] = importance(clean, valid, shares)
        else:
            sums["importance"] = _sum(clean, valid)
    scale = _scale(weights, inputs, noise_std)
    if scale is not None:
        loads = _loads(logits, noisy, k=k, scale=scale)
        if of_groups:
            losses["load"] = _squared_variation(_mean(loads, valid), shares)
        else:
            sums["load"] = _sum(loads, valid)
    if weights.gshard and of_groups:
        losses["gshard"] = gshard(gates, valid, shares)
    elif weights.gshard:
        sums |= {"gates": _sum(gates, valid), "first": _sum(_first(gates), valid)}
    if weights.z:
        losses["z"] = z(logits, valid)
    return losses, sums


def losses_of_sums(
    totals: Mapping[str, Shaped[Array, "..."]], shares: Sequence[float] = ()
) -> dict[str, Float[Array, ""]]:
    """The losses over more than a group, by name, unweighted.

    Args:
        totals: the sums of ``losses_and_sums``, added up over groups, and the number of "tokens".
        shares: see there.
    """
    result = {
        name: _squared_variation(totals[name], shares)
        for name in ("importance", "load")
        if name in totals
    }
    if "first" in totals:
        count = jnp.maximum(totals["tokens"], 1)
        result["gshard"] = _gshard(totals["first"] / count, totals["gates"] / count, shares)
    return result


@functools.partial(jax.jit, static_argnames="weights", inline=True)
def total(
    losses: dict[str, GroupLoss], weights: AuxLossWeights, valid: Bool[Array, "g s"]
) -> Float[Array, ""]:
    """The weighted sum of the losses, averaged over the groups that have a token.

    A loss that has no weight here, of a router of your own, has weight 1.
    """
    ours = {name: x for name, x in vars(weights).items() if name != "over"}
    weighted = sum(
        (ours.get(name, 1.0) * loss for name, loss in losses.items()),
        jnp.zeros((), jnp.float32),
    )
    real = valid.any(axis=1)
    return jnp.where(real, weighted, 0.0).sum() / jnp.maximum(real.sum(), 1)


def importance(
    gates: Float[Array, "g s e"], valid: Bool[Array, "g s"], shares: Sequence[float] = ()
) -> GroupLoss:
    """CV^2 over the experts of their summed gates (V-MoE, appendix A, equation 7).

    Args:
        gates: softmax of the logits without noise.
    """
    return _squared_variation(_sum(gates, valid), shares)


def gshard(
    gates: Float[Array, "g s e"], valid: Bool[Array, "g s"], shares: Sequence[float] = ()
) -> GroupLoss:
    """e^2 times the mean over experts of first-choice share x mean gate (arXiv 2006.16668).

    It is 1 if both are uniform, and e if one expert gets all tokens.
    """
    return _gshard(_mean(_first(gates), valid), _mean(gates, valid), shares)


def z(logits: Float[Array, "g s e"], valid: Bool[Array, "g s"]) -> GroupLoss:
    """Mean squared log-partition of the logits (ST-MoE, arXiv 2202.08906, equation 5)."""
    return _mean(jax.nn.logsumexp(logits, axis=-1, keepdims=True) ** 2, valid)[..., 0]


def _scale(
    weights: AuxLossWeights, inputs: RouterInputs, noise_std: float
) -> Float[Array, "g s e"] | float | None:
    """1 / the noise's standard deviation, for ``_loads``; None without this loss or noise."""
    own_std = inputs.noise_std
    if not weights.load or inputs.noise is None or (own_std is None and noise_std <= 0):
        return None
    return inputs.logits.shape[-1] / noise_std if own_std is None else 1 / own_std


def _loads(
    logits: Float[Array, "g s e"],
    noisy: Float[Array, "g s e"],
    *,
    k: int,
    scale: Float[Array, "g s e"] | float,
) -> Float[Array, "g s e"]:
    """A token's load on each expert (V-MoE, appendix A, equation 10).

    It is the probability that the expert's logit, with new noise of standard deviation 1 / scale,
    exceeds the token's k-th largest noisy logit. The load loss is CV^2 over the experts of the sums
    of loads.
    """
    threshold = top_k(noisy, k)[0][..., -1:]
    return 1.0 - jax.scipy.stats.norm.cdf((threshold - logits) * scale)


def _first(gates: Float[Array, "g s e"]) -> Float[Array, "g s e"]:
    return jax.nn.one_hot(gates.argmax(axis=-1), gates.shape[-1], dtype=gates.dtype)


def _gshard(
    first: Float[Array, "*g e"], gates: Float[Array, "*g e"], shares: Sequence[float]
) -> Float[Array, "*g"]:
    if shares:
        first = first * (min(shares) / jnp.asarray(shares))
    return first.shape[-1] ** 2 * (first * gates).mean(axis=-1)


def _sum(values: Float[Array, "g s x"], valid: Bool[Array, "g s"]) -> Float[Array, "g x"]:
    return jnp.where(valid[..., None], values, 0.0).sum(axis=1)


def _mean(values: Float[Array, "g s x"], valid: Bool[Array, "g s"]) -> Float[Array, "g x"]:
    count = jnp.maximum(valid.sum(axis=1), 1)[:, None]
    return _sum(values, valid) / count


def _squared_variation(
    values: Float[Array, "*g e"], shares: Sequence[float] = ()
) -> Float[Array, "*g"]:
    """Variance over squared mean; not (std / mean)^2, whose gradient is NaN at perfect balance."""
    values = values / jnp.asarray(shares) if shares else values
    # A group of only padding has mean 0: its loss and its gradient are 0.
    mean = values.mean(axis=-1)
    return values.var(axis=-1) / jnp.where(mean > 0, mean, 1.0) ** 2
