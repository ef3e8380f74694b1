"""A step in pieces: each kind of block once, and what lies before and after the blocks.

Blocks of a kind have the same program, so what one costs times their number is what all cost: its
matrix products, what it keeps for the backward pass, what its devices send each other. A piece is
traced and compiled by itself, forward, backward and its part of the update, on shapes alone.

What a step has beside its pieces are sums over numbers: norms and metrics, a few bytes each.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Float

from vmoe import models
from vmoe.analysis import capture
from vmoe.config import MoEConfig, TrainConfig, ViTConfig, replace
from vmoe.costs.collectives import KEEP_APART, Collective, collectives
from vmoe.costs.flops import count_flops
from vmoe.costs.residuals import Residual, residuals
from vmoe.nn.losses import cross_entropy
from vmoe.nn.vit import ViT, num_tokens
from vmoe.sharding import Placement
from vmoe.train.optim import optimizer, update_ema
from vmoe.train.state import Params

Inputs = dict[str, Any]
_State = tuple[Params, Any, Params | None]  # parameters, moments, moving average


@dataclasses.dataclass(frozen=True)
class Segment:
    """A part of a step, as a function of its parameters and of what comes in."""

    name: str
    times: int
    """How often a step has it."""
    config: TrainConfig
    placement: Placement
    params: Params
    """Their shapes."""
    inputs: Inputs
    """Shapes of what comes in: first axes are over the devices, a key is on all."""
    forward: Callable[[Params, Inputs], Any]
    """What the rest of the step gets from here."""

    @property
    def program(self) -> tuple[str, str]:
        """What decides its messages; where all that it has lies everywhere, the mesh does not."""
        leaves = jax.tree.leaves(self._arguments()[0])
        everywhere = all(x.sharding is None or x.sharding.is_fully_replicated for x in leaves)
        return self.name, "" if everywhere else str(self.placement)

    def flops(self) -> int:
        """Of the matrix products of one, forward and backward, on all devices together."""
        return count_flops(jax.make_jaxpr(self._step)(*self._arguments()).jaxpr)

    def collectives(self) -> list[Collective]:
        """What the devices send each other for one, as compiled for so many virtual ones."""
        if self.placement.mesh is None:
            return []
        state, inputs = self._arguments()
        where = jax.tree.map(lambda x: x.sharding, state)
        step = jax.jit(self._step, out_shardings=(where, None))
        compiled = step.lower(state, inputs).compile(compiler_options=KEEP_APART)
        return collectives(compiled.as_text())

    def kept(self) -> float:
        """Bytes that a device keeps of one from its forward to its backward pass.

        What depends on the images is spread over all devices. A parameter counts where it is kept
        in another form than it lies in: rounded, or gathered over "data".
        """
        return sum(map(self._kept, residuals(self.forward, self.params, self.inputs)), 0.0)

    def _kept(self, residual: Residual) -> float:
        if not residual.of_params:
            return residual.size * residual.itemsize / self.placement.devices
        for here, gathered in self._shares():
            if math.prod(here.shape) == residual.size:
                if residual.is_param and here.sharding == gathered.sharding:
                    return 0.0
                return float(math.prod(share(gathered)) * residual.itemsize)
        return float(residual.size * residual.itemsize)

    def _shares(self) -> Iterator[tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]]:
        """Each parameter as it lies, and as it lies where it is used."""
        used = dataclasses.replace(self.placement, fsdp=False)
        trees = (lying(self.params, place.params(self.params)) for place in (self.placement, used))
        yield from zip(*map(jax.tree.leaves, trees), strict=True)

    def _arguments(self) -> tuple[_State, Inputs]:
        placement, moments = self.placement, jax.eval_shape(self._optim().init, self.params)
        params = lying(self.params, placement.params(self.params))
        inputs = {
            name: lying(x, placement.replicated() if name == "key" else placement.batch())
            for name, x in self.inputs.items()
        }
        ema = params if self.config.ema_decay else None
        return (params, lying(moments, placement.opt_state(moments)), ema), inputs

    def _step(self, state: _State, inputs: Inputs) -> tuple[_State, Any]:
        """Forward, backward and update; what goes on from here stands for its own gradient."""
        params, moments, ema = state
        tokens = {name: x for name, x in inputs.items() if name == "tokens"}
        out, back = jax.vjp(
            lambda params, tokens: self.forward(params, inputs | tokens), params, tokens
        )
        gradient, to_tokens = back(out)
        updates, moments = self._optim().update(gradient, moments, params)
        params = optax.apply_updates(params, updates)
        if ema is not None:
            ema = update_ema(ema, params, self.config.ema_decay, jnp.zeros((), jnp.int32))
        return (params, moments, ema), to_tokens

    def _optim(self) -> optax.GradientTransformation:
        return optimizer(self.config.optim, self.config.steps)


def lying(tree: Any, shardings: Any) -> Any:
    """Shapes, each with where it lies: one for all, or a tree; None is one device."""
    shapes, structure = jax.tree.flatten(tree)
    where = jax.tree.leaves(shardings, is_leaf=lambda x: x is None)
    where = where * len(shapes) if shardings is None or len(where) == 1 else where
    return structure.unflatten(
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
        for x, sharding in zip(shapes, where, strict=True)
    )


def share(array: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of what a device holds of an array."""
    return array.sharding.shard_shape(array.shape) if array.sharding else array.shape


def pieces(config: TrainConfig, placement: Placement) -> list[Segment]:
    """All pieces of the step that ``make_train_step`` makes."""
    model = countable(config.model)
    reads_first = model.pooling == "class_token" and not model.full_last_block
    kinds: dict[tuple[MoEConfig | None, bool], list[int]] = {}
    for block in range(model.depth):
        class_token_only = reads_first and block == model.depth - 1
        kinds.setdefault((model.moe_of(block), class_token_only), []).append(block)
    parts = dict(config=config, placement=placement)
    return [
        *(
            Segment(
                _name(model, moe, at), len(at), **parts, **_block(config, placement, moe, first)
            )
            for (moe, first), at in kinds.items()
        ),
        Segment("embedding and head", 1, **parts, **_ends(config, placement)),
    ]


def countable(model: ViTConfig) -> ViTConfig:
    """The model in the form whose products are counted: all slots, or all rows."""
    blocks = [model.moe_of(block) for block in model.sparse_blocks]
    forms = ("ragged" if moe.dropless else "batched" for moe in blocks)
    return replace(
        model, moe=tuple(replace(m, implementation=f) for m, f in zip(blocks, forms, strict=True))
    )


def _name(model: ViTConfig, moe: MoEConfig | None, at: list[int]) -> str:
    kind = "dense block" if moe is None else "sparse block"
    several = len({model.moe_of(block) for block in model.sparse_blocks}) > 1
    if at == [model.depth - 1]:
        return f"last block, {kind.partition(' ')[0]}"
    return f"{kind} as {at[0]}" if moe and several else kind


def _block(
    config: TrainConfig, placement: Placement, moe: MoEConfig | None, class_token_only: bool
) -> dict[str, Any]:
    """One block, as the model runs it; of its routing the balance losses go on."""
    cut = _cut(config.model, moe)
    vit = models.build_abstract(cut, placement=placement)
    vit.norm = _Passing()
    graph, params, rest = nnx.split(vit, nnx.All(nnx.Param, nnx.PathContains("blocks")), ...)

    def forward(params: Params, inputs: Inputs) -> tuple[Float[Array, "b x d"], list[Array]]:
        model: ViT = nnx.merge(graph, params, rest)
        tokens, records = model.encode(**inputs, class_token_only=class_token_only)
        return tokens, [record.aux_loss for record in records.values()]

    b, n = config.batch_size, num_tokens(cut)
    inputs = {
        "tokens": jax.ShapeDtypeStruct((b, n, cut.width), cut.dtype),
        "valid": jax.ShapeDtypeStruct((b,), bool),
        "key": _key(),
    }
    return dict(params=nnx.to_pure_dict(params), inputs=inputs, forward=forward)


def _ends(config: TrainConfig, placement: Placement) -> dict[str, Any]:
    """The model without its blocks: embedding, last norm, pooling, head and loss."""
    cut = _cut(config.model, None)
    vit = models.build_abstract(cut, placement=placement)
    vit.blocks = nnx.List([])
    graph, params, rest = nnx.split(vit, nnx.Param, ...)

    def forward(params: Params, inputs: Inputs) -> Float[Array, ""]:
        model: ViT = nnx.merge(graph, params, rest)
        logits, _ = capture(model, inputs["images"], train=True, key=inputs["key"])
        return cross_entropy(logits, inputs["labels"], config.loss).mean()

    b, side = config.batch_size, cut.image_size
    inputs = {
        "images": jax.ShapeDtypeStruct((b, side, side, 3), jnp.float32),
        "labels": jax.ShapeDtypeStruct((b, cut.num_classes), jnp.float32),
        "key": _key(),
    }
    return dict(params=nnx.to_pure_dict(params), inputs=inputs, forward=forward)


def _cut(model: ViTConfig, moe: MoEConfig | None) -> ViTConfig:
    """The model with one block."""
    return replace(
        model, depth=1, sparse_blocks=() if moe is None else (0,), moe=moe or MoEConfig()
    )


class _Passing(nnx.Module):
    """In the place of the model's last norm, which belongs to another piece."""

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        return tokens


def _key() -> jax.ShapeDtypeStruct:
    return jax.eval_shape(lambda: jax.random.key(0))
