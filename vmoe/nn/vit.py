"""A vision transformer with dense and sparse blocks: from images to logits and routing records."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Bool, Float

from vmoe.axes import Images, Record, Valid
from vmoe.config import ViTConfig
from vmoe.errors import UsageError
from vmoe.nn import keys
from vmoe.nn.attention import Attention
from vmoe.nn.heads import AttentionPool, Head
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.nn.mlp import Mlp
from vmoe.nn.moe import MoE
from vmoe.nn.patches import Patches
from vmoe.nn.positions import LearnedPositions, NoPositions, SinCosPositions
from vmoe.sharding import ONE_DEVICE, Placement


class Block(nnx.Module):
    """Pre-norm transformer block; its ``mlp`` is dense or a mixture of experts."""

    def __init__(
        self, config: ViTConfig, index: int, *, placement: Placement = ONE_DEVICE, rngs: Rngs
    ):
        width, dtype = config.width, jnp.dtype(config.dtype)
        self.norm1 = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            width,
            config.num_heads,
            dropout=config.attention_dropout,
            qk_norm=config.qk_norm,
            dtype=dtype,
            rngs=rngs,
        )
        self.dropout = nnx.Dropout(config.dropout)
        self.norm2 = nnx.LayerNorm(width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        moe = config.moe_of(index)
        if moe is None:
            self.mlp = Mlp(width, config.mlp_dim, dropout=config.dropout, dtype=dtype, rngs=rngs)
        else:
            tokens = num_tokens(config)
            self.mlp = MoE(width, config.mlp_dim, tokens, moe, placement=placement, rngs=rngs)

    def __call__(
        self,
        tokens: Float[Array, "b n d"],
        valid: Bool[Array, "b"],
        key: MaybeKey = None,
        *,
        class_token_only: bool = False,
    ) -> tuple[Float[Array, "b x d"], Record | None]:
        """The tokens after the block, and the record of a sparse one.

        Args:
            valid: False for images that only pad the batch.
            class_token_only: return only the first token of each image, and compute only what it
                depends on. In a sparse block all tokens attend, since all are routed.
        """
        attention_key, dropout_key, mlp_key = keys.split(key, 3)
        normed = self.norm1(tokens)
        if class_token_only and not isinstance(self.mlp, MoE):
            tokens = tokens[:, :1]
        attended = self.attention(normed[:, : tokens.shape[1]], normed, key=attention_key)
        tokens += self.dropout(attended, deterministic=key is None, rngs=dropout_key)
        if not isinstance(self.mlp, MoE):
            return tokens + self.mlp(self.norm2(tokens), mlp_key), None
        change, record = self.mlp(
            self.norm2(tokens), valid, mlp_key, class_token_only=class_token_only
        )
        return tokens[:, : change.shape[1]] + change, record


class ViT(nnx.Module):
    """The model: ``model(images)`` gives logits, ``vmoe.analysis.capture`` the records as well."""

    def __init__(self, config: ViTConfig, *, placement: Placement = ONE_DEVICE, rngs: Rngs):
        self.config = config
        self.placement = placement
        dtype, side = jnp.dtype(config.dtype), config.image_size // config.patch_size
        class_token = config.pooling == "class_token"
        self.patches = Patches(config.patch_size, config.width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, config.width))) if class_token else None
        match config.positions:
            case "learned":
                self.positions = LearnedPositions(
                    (side, side),
                    config.width,
                    class_token=class_token,
                    std=config.position_std,
                    rngs=rngs,
                )
            case "sincos2d":
                self.positions = SinCosPositions(config.width, class_token=class_token)
            case "none":
                self.positions = NoPositions()
        self.dropout = nnx.Dropout(config.dropout)
        self.blocks = nnx.List(
            [Block(config, i, placement=placement, rngs=rngs) for i in range(config.depth)]
        )
        self.norm = nnx.LayerNorm(config.width, epsilon=1e-6, dtype=dtype, rngs=rngs)
        self.attention_pool = (
            AttentionPool(config, dtype=dtype, rngs=rngs) if config.pooling == "attention" else None
        )
        self.head = Head(config, dtype=dtype, rngs=rngs)
        self.rngs = nnx.Rngs(train=rngs.params())

    def __call__(
        self,
        images: Images,
        *,
        train: bool = False,
        key: MaybeKey = None,
        valid: Valid | None = None,
    ) -> Float[Array, "b y"]:
        """Logits, float32, of images of any size that is a multiple of the patch size.

        Args:
            images: pixels in [-1, 1].
            train: apply noise and dropout.
            key: for noise and dropout; if None, the next key of the model's own stream.
            valid: False for images that only pad the batch: they take no slots.

        Raises:
            UsageError: the images are not one float array (b, h, w, 3), their size is not a
                multiple of the patch size, the batch size is not a multiple of the number of
                devices, the capacity leaves no slot, or ``key`` is missing inside ``jax.jit``.
        """
        return self.forward(images, train=train, key=key, valid=valid)[0]

    def forward(
        self,
        images: Images,
        *,
        train: bool = False,
        key: MaybeKey = None,
        valid: Valid | None = None,
    ) -> tuple[Float[Array, "b y"], dict[int, Record]]:
        """Logits, and the record of each sparse block by its number; see ``__call__``."""
        check_images(images)
        if train and key is None:
            key = self._next_key()
        self.placement.check_batch(len(images))
        valid = jnp.ones(len(images), bool) if valid is None else jnp.asarray(valid)
        embed_key, blocks_key = keys.split(key if train else None, 2)
        tokens = self.embed(images, embed_key)
        class_token_only = self.class_token is not None and not self.config.full_last_block
        tokens, records = self.encode(tokens, valid, blocks_key, class_token_only=class_token_only)
        return self.head(self.pool(tokens)), records

    def embed(self, images: Images, key: MaybeKey = None) -> Float[Array, "b n d"]:
        """The class token, if any, and the patch embeddings, plus positions.

        Raises:
            UsageError: the image size is not a multiple of the patch size.
        """
        patches = self.patches(jnp.asarray(images, self.config.dtype))
        _, i, j, _ = patches.shape
        tokens = rearrange(patches, "b i j d -> b (i j) d")
        if self.class_token is not None:
            token = self.class_token[...].astype(tokens.dtype)
            tokens = jnp.concatenate([repeat(token, "1 1 d -> b 1 d", b=len(images)), tokens], 1)
        tokens += self.positions(i, j).astype(tokens.dtype)
        return self.dropout(tokens, deterministic=key is None, rngs=key)

    def encode(
        self,
        tokens: Float[Array, "b n d"],
        valid: Bool[Array, "b"],
        key: MaybeKey = None,
        *,
        class_token_only: bool = False,
    ) -> tuple[Float[Array, "b x d"], dict[int, Record]]:
        """Runs every block and the last norm; returns tokens, and records by block.

        Args:
            class_token_only: return only the first token of each image, and compute in the last
                block only what it depends on. Its values are the same, except for dropout's random
                draws.
        """
        last = len(self.blocks) - 1
        records = {}
        for i, block_key in enumerate(keys.split(key, len(self.blocks))):
            run = functools.partial(Block.__call__, class_token_only=class_token_only and i == last)
            run = functools.partial(_rematerialized, run) if self.config.remat else run
            tokens, record = run(self.blocks[i], self.placement.images(tokens), valid, block_key)
            if record is not None:
                records[i] = record
        return self.norm(tokens), records

    def pool(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """The class token, the mean of the tokens, or their attention pooling."""
        if self.attention_pool is not None:
            return self.attention_pool(tokens)
        return tokens[:, 0] if self.class_token is not None else tokens.mean(axis=1)

    def _next_key(self) -> jax.Array:
        try:
            return self.rngs.train()
        except TraceContextError:
            raise UsageError(
                "model(images, train=True) inside jax.jit: give key=jax.random.key(...), since the "
                "model's own random stream cannot advance there"
            ) from None


def check_images(images: Any) -> None:
    """Checks that the input of a model is one float array (b, h, w, 3).

    Raises:
        UsageError: it is not; names its type or its shape and dtype, and the remedy.
    """
    if not isinstance(images, jax.Array | np.ndarray):
        raise UsageError(
            f"images is a {type(images).__name__}: give one array, float (b, h, w, 3) in [-1, 1]; "
            "np.stack or np.asarray makes one"
        )
    remedy = ""
    if images.ndim == 3:
        remedy = "there is no batch axis: use images[None]"
    elif images.ndim == 4 and images.shape[-1] != 3 and images.shape[1] == 3:
        remedy = "the channels come last: use images.transpose(0, 2, 3, 1)"
    elif images.ndim != 4 or images.shape[-1] != 3:
        remedy = "use (b, h, w, 3)"
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        remedy = "use float in [-1, 1]; vmoe.data.crops.to_float makes it from pixels"
    if remedy:
        raise UsageError(f"images of shape {images.shape} and dtype {images.dtype}: {remedy}")


def _rematerialized(run: Callable[..., Any], block: Block, *inputs: Any) -> Any:
    """``run(block, *inputs)``, saving only its inputs for the backward pass."""
    graph, state = nnx.split(block)  # nnx.remat writes to the model, which fails in jit
    checkpointed = jax.checkpoint(lambda state, *inputs: run(nnx.merge(graph, state), *inputs))
    return checkpointed(state, *inputs)


def num_tokens(config: ViTConfig) -> int:
    """Tokens of an image of the config's size, the class token included."""
    return (config.image_size // config.patch_size) ** 2 + (config.pooling == "class_token")
