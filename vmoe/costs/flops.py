"""What a model costs: parameters, active parameters and FLOPs, counted from its program.

Nothing is allocated: the program is traced on shapes, so the 15B model is counted in seconds.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn

from vmoe import models
from vmoe.analysis.capture import capture
from vmoe.axes import Record, Routing
from vmoe.config import MoEConfig, TokenChoice, ViTConfig, replace
from vmoe.nn.vit import num_tokens


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a model costs."""

    parameters: int
    active_parameters: float
    """Parameters that a token meets: of the experts, only as many as a token is sent to (k where
    tokens choose; e * c / s slots, the mean, where experts choose or the routing is soft)."""
    flops_per_image: float
    """Of the forward pass, every token through every block: its matrix products, a multiplication
    and an addition each."""
    tokens_per_image: int


def cost(config: ViTConfig) -> Cost:
    """Counts a model on full groups of images of its own size.

    Raises:
        UsageError: the capacity leaves no slot.
    """
    jaxpr, b, params, records = _traced(replace(config, full_last_block=True))
    total = _size(params)
    active = float(total)
    for i, record in records.items():
        experts = _size(params["blocks"][i]["mlp"]["experts"])
        active -= experts * (
            1 - _experts_per_token(config.moe_of(i), record) / record.gates.shape[2]
        )
    return Cost(
        parameters=total,
        active_parameters=active,
        flops_per_image=count_flops(jaxpr) / b,
        tokens_per_image=num_tokens(config),
    )


def flops_to_logits(config: ViTConfig) -> float:
    """FLOPs per image of what reaches the logits: less than all where a class token is read.

    Of an image's first tokens, the slots of every expert are counted.
    """
    jaxpr, b, _, _ = _traced(config)
    return count_flops(jaxpr) / b


def _traced(config: ViTConfig) -> tuple[Jaxpr, int, nnx.State, dict[int, Record]]:
    """The forward pass on full groups: its program, how many images, parameters and records."""
    blocks = tuple(_countable(config.moe_of(i)) for i in config.sparse_blocks)
    config = replace(config, moe=blocks)
    graph, params, rest = nnx.split(models.build_abstract(config), nnx.Param, ...)
    b = math.lcm(*[moe.images_per_group for moe in blocks])
    shape = (b, config.image_size, config.image_size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)

    def forward(params: nnx.State, rest: nnx.State, images: jax.Array) -> Any:
        return capture(nnx.merge(graph, params, rest), images)

    jaxpr, (_, records) = jax.make_jaxpr(forward, return_shape=True)(params, rest, images)
    return jaxpr.jaxpr, b, params, records


def _countable(moe: MoEConfig) -> MoEConfig:
    """The layer in the form whose products are counted: all slots, or all rows without capacity."""
    return replace(moe, implementation="ragged" if moe.dropless else "batched")


def _experts_per_token(config: MoEConfig, record: Record) -> float:
    if isinstance(config.router, TokenChoice):
        return float(config.router.k)
    _, s, e = record.gates.shape
    routing = record.routing
    slots = routing.choices if isinstance(routing, Routing) else routing.dispatch
    return min(float(e), e * slots.shape[-1] / s)


def count_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of the matrix products in a traced program.

    Loops count as often as they run; of branches the dearest counts.

    Raises:
        ValueError: a matrix product in a loop whose length only the data knows.

    >>> x = jnp.ones((3, 4))
    >>> count_flops(jax.make_jaxpr(lambda x: x @ x.T)(x).jaxpr)  # 2 * 3 * 4 * 3
    72
    """
    return sum(_flops_of(equation) for equation in jaxpr.eqns)


def _flops_of(equation: JaxprEqn) -> int:
    inner = [count_flops(jaxpr) for jaxpr in _inner(equation)]
    match equation.primitive.name:
        case "dot_general":
            return _dot_flops(equation)
        case "scan":
            return equation.params["length"] * sum(inner)
        case "cond":
            return max(inner)
        case "while" if sum(inner):
            raise ValueError("a matrix product in a loop of unknown length cannot be counted")
        case "ragged_dot" | "ragged_dot_general":
            rows, inputs = equation.invars[0].aval.shape
            return 2 * rows * inputs * equation.outvars[0].aval.shape[-1]
        case "conv_general_dilated" as name:
            raise ValueError(f"{name}: this counter does not know the operation")
    return sum(inner)


def _dot_flops(equation: JaxprEqn) -> int:
    left, _ = (x.aval.shape for x in equation.invars)
    (contracted, _), _ = equation.params["dimension_numbers"]
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _inner(equation: JaxprEqn) -> Iterator[Jaxpr]:
    for value in jax.tree.leaves(list(equation.params.values())):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def _size(params: nnx.State) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
