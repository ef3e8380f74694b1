"""Bodies: modules that map rows to the features of each task."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from vmoe.errors import UsageError
from vmoe.multitask.gates import Gated, TaskGate, as_gate
from vmoe.nn.experts import Experts, Slots, experts_of

ExpertsLike = Experts | Sequence[nnx.Module]


class BodyOutput(NamedTuple):
    """The features of each task, and the experts that they come from.

    Attributes:
        features: one row of features per task and row.
        weights: the weight of each expert for the task, zero for one that the task does not see;
            None if the body has no gates.
        loss: the losses of the gates, to be added to those of the tasks.
    """

    features: Float[Array, "t b f"]
    weights: Float[Array, "t b e"] | None
    loss: Float[Array, ""]


class Body(nnx.Module):
    """The interface of a body. A subclass defines ``__call__``."""

    def __call__(self, rows: Float[Array, "b d"]) -> BodyOutput:
        """The features of every task."""
        raise NotImplementedError


class SharedBottom(Body):
    """One network for all tasks (Caruana 1997)."""

    def __init__(self, network: nnx.Module, num_tasks: int):
        """
        Args:
            network: maps rows f[b d] to features f[b f].
        """
        self.network, self.num_tasks = as_experts([network]), num_tasks

    def __call__(self, rows: Float[Array, "b d"]) -> BodyOutput:
        (features,) = self.network.on_same(rows)
        features = jnp.broadcast_to(features, (self.num_tasks, *features.shape))
        return BodyOutput(features, None, jnp.zeros(()))


class MultiGate(Body):
    """Experts that all tasks share, each through a gate of its own: MMoE (Ma et al. 2018, eq. 6).

    With one gate for all tasks, it is the one-gate model (section 4.1 of the paper).
    """

    def __init__(self, experts: ExpertsLike, gates: Sequence[nnx.Module]):
        """
        Args:
            experts: one module for each expert, see ``vmoe.nn.experts.experts_of``; or experts that
                are computed together.
            gates: a gate, or a module that makes logits f[b e], for each task.

        Raises:
            UsageError: there is no gate.
        """
        if not gates:
            raise UsageError("there is no gate: give one for each task")
        self.experts = as_experts(experts)
        made = {id(gate): as_gate(gate) for gate in gates}
        self.gates = nnx.List([made[id(gate)] for gate in gates])

    def __call__(self, rows: Float[Array, "b d"]) -> BodyOutput:
        outputs = self.experts.on_same(rows)
        each = {id(gate): weigh(gate, rows, self.experts.num_experts) for gate in self.gates}
        weights = jnp.stack([each[id(gate)].weights for gate in self.gates])
        features = jnp.einsum("tbe,ebf->tbf", weights, outputs)
        return BodyOutput(features, weights, sum_losses(list(each.values())))


class CrossStitch(Body):
    """A network for each task; after each layer, features are mixed across tasks.

    The mixtures are learned matrices (t, t), one for each layer (Misra et al. 2016, eq. 1, with one
    unit per layer rather than per channel).

    Parameters: ``layers``; ``stitches``, a matrix (t, t) for each layer.
    """

    def __init__(self, layers: Sequence[ExpertsLike], own: float = 0.9):
        """
        Args:
            layers: the modules of all tasks, one list for each layer.
            own: the weight of a task's own features at the start. The other tasks' features have
                equal weights, which add up to 1 - own.

        Raises:
            UsageError: there is no layer, or layers have unequal numbers of modules.
        """
        self.layers = nnx.List([as_experts(layer) for layer in layers])
        sizes = {layer.num_experts for layer in self.layers}
        if len(sizes) != 1:
            raise UsageError(
                f"cross-stitch: layers have {sorted(sizes)} modules: give each layer one for each "
                "task"
            )
        (t,) = sizes
        rest = (1 - own) / max(1, t - 1)
        start = jnp.full((t, t), rest).at[jnp.diag_indices(t)].set(own if t > 1 else 1.0)
        self.stitches = nnx.List([nnx.Param(start) for _ in self.layers])

    def __call__(self, rows: Float[Array, "b d"]) -> BodyOutput:
        t = self.layers[0].num_experts
        features = jnp.broadcast_to(rows, (t, *rows.shape))
        for layer, stitch in zip(self.layers, self.stitches, strict=True):
            (of_tasks,) = layer(features[None], Slots(1, len(rows), {}))
            features = jnp.einsum("tu,ubf->tbf", stitch[...], of_tasks)
        return BodyOutput(features, None, jnp.zeros(()))


class PleLayer(nnx.Module):
    """Experts of each task beside shared ones; a task's gate sees its own and the shared ones.

    Tang et al. 2020, section 4.1: customized gate control (CGC). A layer that is not the last of
    several also has a shared gate over all experts, which makes the next layer's shared rows
    (section 4.2 of the paper).
    """

    def __init__(
        self,
        of_tasks: Sequence[ExpertsLike],
        shared: ExpertsLike,
        gates: Sequence[nnx.Module],
        shared_gate: nnx.Module | None = None,
    ):
        """
        Args:
            of_tasks: the experts of each task.
            shared: the experts of all tasks.
            gates: for each task, over its own experts and then the shared ones.
            shared_gate: over the experts of the first task, of the second, ..., and the shared.

        Raises:
            UsageError: the numbers of tasks of experts and gates differ.
        """
        if len(of_tasks) != len(gates):
            raise UsageError(
                f"there are experts of {len(of_tasks)} tasks and {len(gates)} gates: give each "
                "task both"
            )
        self.of_tasks = nnx.List([as_experts(experts) for experts in of_tasks])
        self.shared = as_experts(shared)
        self.gates = nnx.List([as_gate(gate) for gate in gates])
        self.shared_gate = None if shared_gate is None else as_gate(shared_gate)

    def __call__(
        self, rows: Float[Array, "t b d"], shared_rows: Float[Array, "b d"]
    ) -> tuple[BodyOutput, Float[Array, "b f"] | None]:
        """The features of the tasks, and those of the shared experts if there is a shared gate.

        Args:
            rows: the input of each task's experts and gate.
            shared_rows: the input of the shared experts and the shared gate.
        """
        shared = self.shared.on_same(shared_rows)
        of_tasks = [experts.on_same(x) for experts, x in zip(self.of_tasks, rows, strict=True)]
        gated = [
            weigh(gate, x, len(outputs) + len(shared))
            for gate, x, outputs in zip(self.gates, rows, of_tasks, strict=True)
        ]
        features = [
            jnp.einsum("be,ebf->bf", each.weights, jnp.concatenate([outputs, shared]))
            for each, outputs in zip(gated, of_tasks, strict=True)
        ]
        weights = self._over_all([each.weights for each in gated])
        next_shared = None
        if self.shared_gate is not None:
            every = jnp.concatenate([*of_tasks, shared])
            gated.append(weigh(self.shared_gate, shared_rows, len(every)))
            next_shared = jnp.einsum("be,ebf->bf", gated[-1].weights, every)
        return BodyOutput(jnp.stack(features), weights, sum_losses(gated)), next_shared

    def _over_all(self, weights: Sequence[Float[Array, "b _"]]) -> Float[Array, "t b e"]:
        """The weights of a task for all experts of the layer."""
        sizes = [experts.num_experts for experts in self.of_tasks]
        placed = []
        for i, of_task in enumerate(weights):
            own, shared = of_task[:, : sizes[i]], of_task[:, sizes[i] :]
            before, after = (
                jnp.zeros((len(own), sum(some))) for some in (sizes[:i], sizes[i + 1 :])
            )
            placed.append(jnp.concatenate([before, own, after, shared], axis=1))
        return jnp.stack(placed)


class Ple(Body):
    """Layers of experts of the tasks and shared ones: PLE (Tang et al. 2020), with one layer CGC.

    The weights are those of the last layer.
    """

    def __init__(self, layers: Sequence[PleLayer]):
        """
        Args:
            layers: the last one has no shared gate, all others have one.

        Raises:
            UsageError: there is no layer, or a shared gate is missing or too many.
        """
        if [layer.shared_gate is None for layer in layers] != [False] * (len(layers) - 1) + [True]:
            raise UsageError("all layers but the last need a shared gate, and the last has none")
        self.layers = nnx.List(layers)

    def __call__(self, rows: Float[Array, "b d"]) -> BodyOutput:
        features = jnp.broadcast_to(rows, (len(self.layers[0].gates), *rows.shape))
        shared, loss = rows, jnp.zeros(())
        for layer in self.layers[:-1]:
            made, shared = layer(features, shared)
            features, loss = made.features, loss + made.loss
        made, _ = self.layers[-1](features, shared)
        return made._replace(loss=loss + made.loss)


def as_experts(experts: ExpertsLike) -> Experts:
    """A list of modules as experts; experts as they are.

    Raises:
        UsageError: they are no modules, or ask for places of tokens in an image.
    """
    experts = experts_of(experts)
    if experts.asks or experts.takes:
        asked = ", ".join(sorted(experts.asks | experts.takes))
        raise UsageError(
            f"experts of several tasks get rows alone: use experts that do not need {asked}"
        )
    return experts


def weigh(gate: TaskGate, rows: Float[Array, "b d"], num_experts: int) -> Gated:
    """The weights of a gate."""
    gated = gate(rows)
    if (n := gated.weights.shape[1]) != num_experts:
        raise UsageError(f"a gate has weights for {n} experts, and there are {num_experts}")
    return gated


def sum_losses(gated: Sequence[Gated]) -> Float[Array, ""]:
    """The losses of several gates."""
    return jnp.stack([each.loss for each in gated]).sum()
