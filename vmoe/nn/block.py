"""One block of a vision transformer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.axes import Record, Route
from vmoe.config import ViTConfig
from vmoe.nn import keys
from vmoe.nn.attention import Attention
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.nn.mlp import Hidden, Mlp, make_norm
from vmoe.nn.moe import MoE
from vmoe.nn.patches import num_tokens
from vmoe.sharding import ONE_DEVICE, Placement


class BlockOutputs(NamedTuple):
    """The tokens after a block, and what the block added to them.

    Attributes:
        tokens: the tokens after the block.
        attention: output of the attention, before dropout.
        mlp: output of the MLP or of the MoE layer.
        record: routing record of a sparse block; None for a dense block.
    """

    tokens: Float[Array, "b x d"]
    attention: Float[Array, "b q d"]
    mlp: Float[Array, "b x d"]
    record: Record | None


class Block(nnx.Module):
    """Pre-norm transformer block; its ``mlp`` is dense or a mixture of experts."""

    def __init__(
        self, config: ViTConfig, index: int, *, placement: Placement = ONE_DEVICE, rngs: Rngs
    ):
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.norm1 = make_norm(config, rngs=rngs)
        of_heads = config.num_heads * config.dim_per_head
        self.attention = Attention(
            width,
            config.num_heads,
            dropout=config.attention_dropout,
            head_dim=config.head_dim,
            qk_norm=config.qk_norm,
            qk_rms=config.qk_rms,
            sink=config.attention_sink,
            rotary=config.rotary,
            norm=make_norm(config, of_heads, rngs=rngs) if config.attention_norm else None,
            dtype=dtype,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.norm2 = make_norm(config, rngs=rngs)
        moe = config.moe_of(index)
        if moe is None:
            hidden = Hidden(config.activation, config.dropout, gated=config.mlp != "plain")
            inner = config.mlp == "gated_norm"
            norm = make_norm(config, config.mlp_dim, rngs=rngs) if inner else None
            self.mlp = Mlp(width, config.mlp_dim, hidden=hidden, norm=norm, dtype=dtype, rngs=rngs)
        else:
            self.mlp = MoE.from_config(
                moe,
                width,
                config.mlp_dim,
                num_tokens(config),
                activation=config.activation,
                dtype=dtype,
                placement=placement,
                rngs=rngs,
            )

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        valid: Bool[Array, "b"],
        key: MaybeKey = None,
        rotation: Float[Array, "2 n _ z"] | None = None,
        *,
        class_token_only: bool = False,
        decide: Route | None = None,
    ) -> BlockOutputs:
        """The tokens after the block, its parts' outputs, and the record of a sparse block.

        Args:
            valid: False for images that only pad the batch.
            rotation: of rotary positions; see ``ViT.rotation``.
            class_token_only: return only the first token of each image, and skip work that cannot
                change it. In a sparse block all tokens attend, since all are routed.
            decide: replaces the router of a sparse block.
        """
        attention_key, dropout_key, mlp_key = keys.split(key, 3)
        normed = self.norm1(tokens)
        if class_token_only and not isinstance(self.mlp, MoE):
            tokens = tokens[:, :1]
        queries = normed[:, : tokens.shape[1]]
        attended = self.attention(queries, normed, key=attention_key, rotation=rotation)
        tokens += self.dropout(attended, deterministic=key is None, rngs=dropout_key)
        normed, record = self.norm2(tokens), None
        if isinstance(self.mlp, MoE):
            with jax.named_scope("moe"):
                change, record = self.mlp.forward(
                    normed,
                    mask=jnp.broadcast_to(valid[:, None], normed.shape[:2]),
                    key=mlp_key,
                    class_token_only=class_token_only,
                    decide=decide,
                )
        else:
            change = self.mlp(normed, mlp_key)
        return BlockOutputs(tokens[:, : change.shape[1]] + change, attended, change, record)


def rematerialized(run: Callable[..., Any], block: Block, *inputs: Any) -> Any:
    """``run(block, *inputs)``, saving only its inputs for the backward pass."""
    graph, state = nnx.split(block, graph=True)  # nnx.remat writes to the model, which fails in jit
    checkpointed = jax.checkpoint(lambda state, *inputs: run(nnx.merge(graph, state), *inputs))
    return checkpointed(state, *inputs)
