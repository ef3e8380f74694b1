"""Parameters, active parameters and FLOPs of a model, counted in its traced program.

Nothing is allocated: the program is traced on shapes, so counting the 15B model takes seconds.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from vmoe import models
from vmoe.axes import Record, Routing
from vmoe.config import MoEConfig, ViTConfig, replace
from vmoe.nn.keys import InitKeys
from vmoe.nn.moe import MoE
from vmoe.nn.patches import num_tokens
from vmoe.nn.vit import ViT
from vmoe.sharding import Placement


@dataclasses.dataclass(frozen=True)
class Cost:
    """Size and compute of a model."""

    parameters: int
    active_parameters: float
    """Parameters that process one token. The number of experts per token is k for token choice, and
    the mean, e * c / s, for expert choice and soft routing. Experts of different kinds count with
    the mean of their parameters, as if all were chosen equally often."""
    flops_per_image: float
    """Matmuls and convolutions of the forward pass, with every token in every block; a multiply-add
    counts as 2."""
    tokens_per_image: int


_UNPADDED = Placement(stands_for="cpu")
"""One device that computes no padding: a GPU's blocks of rows would count as full, of which a group
alone fills few, while the batch of a run fills most."""


def cost(config: ViTConfig) -> Cost:
    """The cost of a model, with full groups of images of the config's size."""
    config = replace(config, full_last_block=True)
    flops, params, records, like = _trace(config)
    blocks = [_size(params["blocks"][j]) for j in range(len(params["blocks"]))]
    total = _size(params) - sum(blocks) + sum(blocks[j] for j in like)
    active = float(total)
    for i, moe in config.moe_blocks.items():
        record = records[like[i]]
        experts = _size(params["blocks"][like[i]].get("mlp", {}).get("experts", {}))  # may be none
        active -= experts * (1 - _experts_per_token(moe, record) / record.gates.shape[2])
    return Cost(
        parameters=total,
        active_parameters=active,
        flops_per_image=flops,
        tokens_per_image=num_tokens(config),
    )


def flops_to_logits(config: ViTConfig) -> float:
    """FLOPs per image, without work in the last block that cannot reach the logits.

    There is such work if only the class token is read. In a sparse last block, all slots for
    class tokens count, filled or not.
    """
    return _trace(config)[0]


def training_flops(config: ViTConfig) -> float:
    """FLOPs per image of a training step, if no part of the model is frozen.

    Three times the FLOPs of the forward pass: the backward pass has two matmuls for each of these.
    Recomputing activations does not count (PaLM, arXiv 2204.02311, appendix B).
    """

    def trained(moe: MoEConfig) -> MoEConfig:
        same = moe.router.in_evaluation() is moe.router
        return moe if same else replace(moe, router=dict(eval_capacity_factor=None))

    return 3 * flops_to_logits(config.with_layers(trained))


def sparse_layer_flops(config: ViTConfig, moe: MoEConfig, *, class_token_only: bool) -> float:
    """FLOPs per image of one MoE layer alone, in full groups.

    Args:
        class_token_only: count only work that the class tokens depend on, as in a last block whose
            other tokens are not read.
    """
    n, moe = num_tokens(config), _countable_layer(moe)

    def build() -> MoE:
        sizes, activation = (config.width, config.mlp_dim, n), config.activation
        rngs = InitKeys(0)
        return MoE.from_config(moe, *sizes, activation=activation, placement=_UNPADDED, rngs=rngs)

    graph, state = nnx.split(nnx.eval_shape(build))
    b = moe.router.images_per_group

    def forward(state: nnx.State, tokens: jax.Array) -> jax.Array:
        layer: MoE = nnx.merge(graph, state)
        return layer(tokens, class_token_only=class_token_only)

    tokens = jax.ShapeDtypeStruct((b, n, config.width), jnp.dtype(config.dtype))
    return count_flops(jax.make_jaxpr(forward)(state, tokens).jaxpr) / b


def countable(model: ViTConfig) -> ViTConfig:
    """The model with implementations of the experts whose FLOPs can be counted.

    These are ``ragged`` for layers that send rows, which computes all rows that can be kept, and
    ``batched`` for others, which computes all slots: also for "auto" with a capacity, as in the
    paper. The number of steps of ``blocked`` depends on the data.
    """
    return replace(model, moe=tuple(map(_countable_layer, model.moe_blocks.values())))


def _countable_layer(moe: MoEConfig) -> MoEConfig:
    implementation = "ragged" if moe.sends_rows else "batched"
    return dataclasses.replace(moe, experts=moe.experts.computed(implementation))


@functools.lru_cache(maxsize=4)
def _trace(config: ViTConfig) -> tuple[float, nnx.State, dict[int, Record], list[int]]:
    """The forward pass on full groups: FLOPs per image, parameters, records, and like blocks.

    The parameters and records are those of ``models.distinct_blocks``. Cached, since tracing takes
    half a second.
    """
    small, like = models.distinct_blocks(countable(config))
    model = models.build_abstract(small, placement=_UNPADDED)
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    b = math.lcm(*(moe.router.images_per_group for moe in small.moe_blocks.values()))
    shape = (b, small.image_size, small.image_size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)

    def forward(params: nnx.State, rest: nnx.State, images: jax.Array) -> Any:
        model: ViT = nnx.merge(graph, params, rest)
        return model.forward(images)

    jaxpr, (_, records) = jax.make_jaxpr(forward, return_shape=True)(params, rest, images)
    times = collections.Counter(f"block{j}" for j in like)  # by scope; others run once
    flops = sum(
        count * times.get(scope.split("/")[1], 1)
        for scope, count in flops_by_scope(jaxpr.jaxpr).items()
    )
    return flops / b, params, records, like


def _experts_per_token(config: MoEConfig, record: Record) -> float:
    if config.router.can_drop:
        return float(config.router.k)
    _, s, e = record.gates.shape
    routing = record.routing
    slots = routing.choices if isinstance(routing, Routing) else routing.dispatch
    return min(float(e), e * slots.shape[-1] / s)


def count_flops(jaxpr: Jaxpr) -> int:
    """FLOPs of the matmuls and convolutions in a traced program; a multiply-add counts as 2.

    A loop counts its body once per iteration, a conditional its most expensive branch. A
    convolution counts its padding, and not the zeros of a dilated input.

    Raises:
        ValueError: a matmul in a loop whose length depends on the data.

    >>> x = jnp.ones((3, 4))
    >>> count_flops(jax.make_jaxpr(lambda x: x @ x.T)(x).jaxpr)  # 2 * 3 * 4 * 3
    72
    """
    return sum(flops_by_scope(jaxpr).values())


def flops_by_scope(jaxpr: Jaxpr, scope: str = "") -> collections.Counter[str]:
    """``count_flops`` by the scopes of ``jax.named_scope``, such as "jvp(block0)/attention".

    Args:
        scope: of the program itself.
    """
    total = collections.Counter[str]()
    for equation in jaxpr.eqns:
        total += _equation_flops(equation, scope)
    return total


def _equation_flops(equation: JaxprEqn, outer: str) -> collections.Counter[str]:
    name, params = equation.primitive.name, equation.params
    inner = list(inner_jaxprs(equation))
    if not inner and name not in PRODUCTS:
        return collections.Counter()
    scope = f"{outer}/{equation.source_info.name_stack}"
    each = [flops_by_scope(jaxpr, scope) for jaxpr in inner]
    match name:
        case "scan":
            return _times(params["length"], *each)
        case "shard_map":  # its program is that of one device
            return _times(params["mesh"].size, *each)
        case "cond":
            return max(each, key=collections.Counter.total)
        case "while" if any(each):
            raise ValueError("a matrix product in a loop of unknown length cannot be counted")
    own = PRODUCTS[name](equation) if name in PRODUCTS else 0
    return sum(each, collections.Counter({scope: own}))


def _times(number: int, *counters: collections.Counter[str]) -> collections.Counter[str]:
    return collections.Counter({k: number * x for each in counters for k, x in each.items()})


def _dot_flops(equation: JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, outputs = array(equation.invars[0]).shape, array(equation.outvars[0]).shape
    return 2 * math.prod(outputs) * math.prod(left[i] for i in contracted)


def _ragged_flops(equation: JaxprEqn) -> int:
    rows, inputs = array(equation.invars[0]).shape
    return 2 * rows * inputs * array(equation.outvars[0]).shape[-1]


def _convolution_flops(equation: JaxprEqn) -> int:
    kernel, outputs = array(equation.invars[1]).shape, array(equation.outvars[0]).shape
    taps = math.prod(kernel) // kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(outputs) * taps // math.prod(equation.params["lhs_dilation"])


PRODUCTS = {
    "dot_general": _dot_flops,
    "ragged_dot": _ragged_flops,
    "ragged_dot_general": _ragged_flops,
    "conv_general_dilated": _convolution_flops,
}
"""FLOPs of the operations that multiply matrices."""


def inner_jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """The programs inside an operation, such as those of a loop or a call."""
    for value in jax.tree.leaves(list(equation.params.values())):
        if isinstance(value, ClosedJaxpr):
            yield value.jaxpr
        elif isinstance(value, Jaxpr):
            yield value


def array(value: Var | Literal) -> jax.core.ShapedArray:
    """The shape and dtype of an input or output of an operation."""
    if not isinstance(value.aval, jax.core.ShapedArray):
        raise TypeError(f"{value} is not an array: {value.aval}")
    return value.aval


def _size(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
