"""New models by the name of their architecture."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from vmoe.multitask.bodies import (
    Body,
    CrossStitch,
    MultiGate,
    Ple,
    PleLayer,
    SharedBottom,
)
from vmoe.multitask.chains import AdaptiveTransfer, Aitm, Esmm, TaskNetworks
from vmoe.multitask.gates import DSelectK, HiddenGate, Softmax, TaskGate
from vmoe.multitask.model import MultiTask
from vmoe.nn.experts import Experts, experts_of


class ReluLayers(nnx.Module):
    """Linear layers, each followed by a ReLU, and a last one without, if ``outputs`` is given.

    In training, dropout follows each ReLU.
    """

    def __init__(
        self,
        width: int,
        units: Sequence[int],
        outputs: int | None = None,
        *,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        sizes = [width, *units]
        self.hidden = nnx.List(
            [nnx.Linear(a, b, rngs=rngs) for a, b in zip(sizes, sizes[1:], strict=False)]
        )
        self.last = None if outputs is None else nnx.Linear(sizes[-1], outputs, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None

    def __call__(self, rows: Float[Array, "b d"]) -> Float[Array, "b f"]:
        for layer in self.hidden:
            rows = jax.nn.relu(layer(rows))
            rows = rows if self.dropout is None else self.dropout(rows)
        return rows if self.last is None else self.last(rows)


class BodyConfig(NamedTuple):
    """What a body is made of; see the parameters of ``MultiTaskEstimator``.

    Attributes:
        tasks: number of tasks.
        units: sizes of an expert's layers.
        experts: number of experts that tasks share.
        task_experts: number of experts of each task.
        layers: number of layers of "ple".
        gate: "softmax" or "dselect_k".
        gate_units: sizes of a gate's hidden layers.
        gate_temperature: of "softmax".
        k: number of selectors of "dselect_k".
        entropy_weight: weight of the entropy of "dselect_k" in the loss.
        calibrator_weight: weight of the calibrator of "aitm" in the loss.
        expert: makes an expert for rows of a width; None for layers of ``units``.
        dropout: rate of dropout after each layer of ``units`` and of the towers, in training.
    """

    tasks: int
    units: tuple[int, ...]
    experts: int = 0
    task_experts: int = 0
    layers: int = 1
    gate: str = "softmax"
    gate_units: tuple[int, ...] = ()
    gate_temperature: float = 1.0
    k: int = 0
    entropy_weight: float = 0.0
    calibrator_weight: float = 0.0
    expert: Callable[..., nnx.Module] | None = None
    dropout: float = 0.0

    def new_expert(self, width: int, rngs: nnx.Rngs) -> nnx.Module:
        if self.expert is None:
            return ReluLayers(width, self.units, dropout=self.dropout, rngs=rngs)
        return self.expert(width, rngs=rngs)

    def new_experts(self, n: int, width: int, rngs: nnx.Rngs) -> Experts:
        """New experts, each initialized separately."""
        return experts_of([self.new_expert(width, rngs) for _ in range(n)])

    def new_gate(self, width: int, experts: int, rngs: nnx.Rngs) -> TaskGate:
        if self.gate_units:
            hidden = ReluLayers(width, self.gate_units, rngs=rngs)
            last = self._replace(gate_units=()).new_gate(self.gate_units[-1], experts, rngs)
            return HiddenGate(hidden, last)
        if self.gate == "dselect_k":
            return DSelectK(width, experts, self.k, entropy_weight=self.entropy_weight, rngs=rngs)
        logits = nnx.Linear(width, experts, use_bias=False, rngs=rngs)
        return Softmax(logits, self.gate_temperature)


def shared_bottom(config: BodyConfig, width: int, rngs: nnx.Rngs) -> Body:
    return SharedBottom(config.new_expert(width, rngs), config.tasks)


def one_gate(config: BodyConfig, width: int, rngs: nnx.Rngs) -> Body:
    experts = config.new_experts(config.experts, width, rngs)
    return MultiGate(experts, [config.new_gate(width, config.experts, rngs)] * config.tasks)


def mmoe(config: BodyConfig, width: int, rngs: nnx.Rngs) -> Body:
    experts = config.new_experts(config.experts, width, rngs)
    gates = [config.new_gate(width, config.experts, rngs) for _ in range(config.tasks)]
    return MultiGate(experts, gates)


def cross_stitch(config: BodyConfig, width: int, rngs: nnx.Rngs) -> Body:
    widths = [width, *config.units]
    layers = [
        experts_of(
            [ReluLayers(a, (b,), dropout=config.dropout, rngs=rngs) for _ in range(config.tasks)]
        )
        for a, b in zip(widths, widths[1:], strict=False)
    ]
    return CrossStitch(layers)


def cgc(config: BodyConfig, width: int, rngs: nnx.Rngs) -> Body:
    return Ple([ple_layer(config, width, rngs, last=True)])


def ple(config: BodyConfig, width: int, rngs: nnx.Rngs) -> Body:
    layers = []
    for i in range(config.layers):
        layers.append(ple_layer(config, width, rngs, last=i == config.layers - 1))
        width = width_after(layers[-1].shared, lambda experts, rows: experts.on_same(rows), width)
    return Ple(layers)


def ple_layer(config: BodyConfig, width: int, rngs: nnx.Rngs, *, last: bool) -> PleLayer:
    t, own, shared = config.tasks, config.task_experts, config.experts
    return PleLayer(
        [config.new_experts(own, width, rngs) for _ in range(t)],
        config.new_experts(shared, width, rngs),
        [config.new_gate(width, own + shared, rngs) for _ in range(t)],
        None if last else config.new_gate(width, t * own + shared, rngs),
    )


def esmm(config: BodyConfig, width: int, rngs: nnx.Rngs) -> Body:
    return TaskNetworks(config.new_experts(config.tasks, width, rngs))


def aitm(config: BodyConfig, width: int, rngs: nnx.Rngs) -> Body:
    networks = config.new_experts(config.tasks, width, rngs)
    f = width_after(networks, lambda networks, rows: networks.on_same(rows), width)
    transfers = [ReluLayers(f, (f,), rngs=rngs) for _ in range(config.tasks - 1)]
    value, query, key = (nnx.Linear(f, f, use_bias=False, rngs=rngs) for _ in range(3))
    return AdaptiveTransfer(networks, transfers, value=value, query=query, key=key)


ARCHITECTURES: dict[str, Callable[[BodyConfig, int, nnx.Rngs], Body]] = {
    "shared_bottom": shared_bottom,
    "one_gate": one_gate,
    "mmoe": mmoe,
    "cross_stitch": cross_stitch,
    "cgc": cgc,
    "ple": ple,
    "esmm": esmm,
    "aitm": aitm,
}
GATED = ("one_gate", "mmoe", "cgc", "ple")
"""Architectures with gates over experts."""
CHAINS = ("esmm", "aitm")
"""Architectures whose tasks are a chain of events."""


def new_model(
    architecture: str,
    config: BodyConfig,
    width: int,
    outputs: Mapping[str, int],
    tower_units: Sequence[int],
    inputs: nnx.Module | None = None,
    *,
    rngs: nnx.Rngs,
) -> MultiTask:
    """A new model.

    Args:
        width: number d of numbers of a row.
        outputs: the number of outputs of each task by name.
        tower_units: sizes of the hidden layers of a tower.
        inputs: makes the rows.
    """
    body = ARCHITECTURES[architecture](config, width, rngs)
    features = width_after(body, lambda body, rows: body(rows).features, width)
    towers = {
        name: ReluLayers(features, tuple(tower_units), size, dropout=config.dropout, rngs=rngs)
        for name, size in outputs.items()
    }
    if architecture == "aitm":
        return Aitm(body, towers, inputs, weight=config.calibrator_weight)
    return (Esmm if architecture == "esmm" else MultiTask)(body, towers, inputs)


def width_after(
    module: nnx.Module, apply: Callable[[nnx.Module, jax.Array], jax.Array], width: int
) -> int:
    """The size of the last axis of what a module makes of rows f[b width].

    Args:
        apply: calls the module, whose random streams stay as they are.
    """
    graph, state = nnx.split(module, graph=True)
    shape = jax.eval_shape(
        lambda rows: apply(nnx.merge(graph, state, copy=True), rows),
        jax.ShapeDtypeStruct((1, width), "float32"),
    )
    return shape.shape[-1]
