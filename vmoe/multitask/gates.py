"""Gates of a task: from rows to the weights of the experts."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vmoe.errors import UsageError


class Gated(NamedTuple):
    """The output of a gate.

    Attributes:
        weights: the weights of the experts, in [0, 1]. Those of a row sum to 1, or to less where
            ``DSelectK`` selects a code that has no expert.
        loss: a loss of the gate itself, to be added to those of the tasks.
    """

    weights: Float[Array, "b e"]
    loss: Float[Array, ""]


class TaskGate(nnx.Module):
    """The interface of a gate. A subclass defines ``__call__``."""

    def __call__(self, rows: Float[Array, "b d"]) -> Gated:
        """The weights of the experts for each row."""
        raise NotImplementedError


class Softmax(TaskGate):
    """A softmax over the logits of any module."""

    def __init__(self, logits: nnx.Module, temperature: float = 1.0):
        """
        Args:
            logits: maps rows f[b d] to logits f[b e], such as ``nnx.Linear``.
            temperature: divides the logits; the higher, the more equal are the weights.
        """
        self.logits, self.temperature = logits, temperature

    def __call__(self, rows: Float[Array, "b d"]) -> Gated:
        logits = self.logits(rows).astype(jnp.float32)
        return Gated(jax.nn.softmax(logits / self.temperature), jnp.zeros(()))


class HiddenGate(TaskGate):
    """A gate that sees features of the rows."""

    def __init__(self, hidden: nnx.Module, gate: TaskGate):
        """
        Args:
            hidden: maps rows f[b d] to features f[b f].
            gate: of the features.
        """
        self.hidden, self.gate = hidden, gate

    def __call__(self, rows: Float[Array, "b d"]) -> Gated:
        return self.gate(self.hidden(rows))


class DSelectK(TaskGate):
    """A gate by k selectors that learn which expert a row needs (Hazimeh et al. 2021, section 3).

    A selector chooses an expert by a binary code of ceil(log2 e) bits. A bit is a smooth step
    of a linear function of the row: exactly 0 or 1 where this is at least 1/2 from 0, and between
    them otherwise. The probability of an expert is the product of its bits, and the weights are
    the mean over the selectors by a softmax. So a row uses at most k experts wherever its bits
    are decided; ``entropy_weight`` makes the selectors decide.

    With e not a power of 2, some codes have no expert. The loss then has the sum over selectors of
    1 / p, where p is the probability of the codes with an expert; here p counts as at least 1/100,
    because a decided selector can have p = 0. This term and the entropies are means over rows; the
    authors' code sums them over the batch, so an ``entropy_weight`` of theirs is larger here by the
    batch size.

    Parameters: ``bits``, a linear layer (d, k * bits); ``selectors``, a linear layer (d, k).
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        k: int = 2,
        *,
        entropy_weight: float = 0.0,
        rngs: nnx.Rngs,
    ):
        """
        Args:
            width: number d of numbers of a row.
            k: number of selectors, in [1, e].
            entropy_weight: weight of the selectors' entropies in the loss.

        Raises:
            UsageError: k is larger than the number of experts.
        """
        if not 1 <= k <= num_experts:
            raise UsageError(f"use 1 to {num_experts}, the number of experts", k=k)
        self.k, self.entropy_weight = k, entropy_weight
        bits = math.ceil(math.log2(num_experts))
        self.bits = nnx.Linear(width, k * bits, kernel_init=around_0, bias_init=around_0, rngs=rngs)
        self.selectors = nnx.Linear(width, k, rngs=rngs)
        self.codes = tuple(
            tuple(bool(expert >> bit & 1) for bit in range(bits)) for expert in range(num_experts)
        )

    def __call__(self, rows: Float[Array, "b d"]) -> Gated:
        codes = np.asarray(self.codes)  # e bits
        steps = smooth_step(self.bits(rows).reshape(len(rows), self.k, 1, codes.shape[1]))
        chosen = jnp.where(codes, steps, 1 - steps).prod(-1)  # b k e
        weights = jnp.einsum("bk,bke->be", jax.nn.softmax(self.selectors(rows)), chosen)
        entropy = -(chosen * jnp.log(chosen + 1e-6)).sum((1, 2)).mean()
        loss = self.entropy_weight * entropy
        if len(codes) < 2 ** codes.shape[1]:
            loss += (1 / jnp.maximum(chosen.sum(-1), 0.01)).sum(-1).mean()
        return Gated(weights, loss)


def around_0(key: jax.Array, *args: object) -> jax.Array:
    """Small initial values. One function for all layers, whose structures can then be equal."""
    return nnx.initializers.uniform(0.02)(key, *args) - 0.01


def smooth_step(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """0 below -1/2, 1 above 1/2, and between them the cubic that joins both smoothly."""
    x = jnp.clip(x, -0.5, 0.5)
    return 0.5 + 1.5 * x - 2 * x**3


def as_gate(module: nnx.Module) -> TaskGate:
    """A module that makes logits as a gate; a gate as it is."""
    return module if isinstance(module, TaskGate) else Softmax(module)
