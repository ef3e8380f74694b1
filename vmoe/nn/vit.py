"""A vision transformer with dense and sparse blocks: from images to logits and routing records."""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from flax.errors import TraceContextError
from jaxtyping import Array, Bool, Float

from vmoe.axes import Images, Record, Route, Valid
from vmoe.config import ViTConfig, replace
from vmoe.errors import UsageError
from vmoe.host import forks
from vmoe.nn import keys
from vmoe.nn.block import Block, BlockOutputs, rematerialized
from vmoe.nn.heads import AttentionPool, Head
from vmoe.nn.inputs import as_tokens, check_images, check_mask
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.nn.mlp import make_norm
from vmoe.nn.moe import MoE
from vmoe.nn.patches import Patches
from vmoe.nn.positions import LearnedPositions, NoPositions, SinCosPositions, rotation
from vmoe.sharding import ONE_DEVICE, Placement


class ViT(nnx.Module):
    """The model: ``model(images)`` returns logits; ``forward`` also returns the routing records.

    MoE layers have custom backward passes, so a sparse model supports only reverse-mode
    differentiation: ``jax.grad``, ``jax.vjp`` and ``jax.jacrev``. ``jax.jvp``, ``jax.jacfwd`` and
    ``jax.hessian`` raise a UsageError.
    """

    def __init__(self, config: ViTConfig, *, placement: Placement = ONE_DEVICE, rngs: Rngs):
        self.config = config
        self.placement = placement
        dtype, side = jnp.dtype(config.dtype), config.image_size // config.patch_size
        class_token = config.has_class_token
        self.patches = Patches(config.patch_size, config.width, dtype=dtype, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, 1, config.width))) if class_token else None
        init = nnx.initializers.normal(0.02)  # as in DINOv3's code; DINOv2's has 1e-6
        self.registers = (
            nnx.Param(init(rngs.params(), (1, config.registers, config.width), jnp.float32))
            if config.registers
            else None
        )
        match config.positions:
            case "learned":
                self.positions = LearnedPositions(
                    (side, side),
                    config.width,
                    class_token=class_token,
                    resampling=config.position_resampling,
                    std=config.position_std,
                    rngs=rngs,
                )
            case "sincos2d":
                self.positions = SinCosPositions(config.width, class_token=class_token)
            case "none":
                self.positions = NoPositions()
        self.dropout = nnx.Dropout(config.dropout)
        self.pre_norm = make_norm(config, rngs=rngs) if config.pre_norm else None
        self.blocks = nnx.List(
            [Block(config, i, placement=placement, rngs=rngs) for i in range(config.depth)]
        )
        self.norm = make_norm(config, rngs=rngs)
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
        """Logits in float32, for images of any size that is a multiple of the patch size.

        If the config has no classes, features are returned instead. Training also needs the
        auxiliary losses, which ``forward`` returns.

        Args:
            images: pixels in [-1, 1].
            train: apply noise and dropout.
            key: for noise and dropout; if None, the next key of the model's own stream is used.
            valid: False for images that only pad the batch, which take no slots.

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
        decide: Mapping[int, Route] | None = None,
    ) -> tuple[Float[Array, "b y"], dict[int, Record]]:
        """Logits, and the record of each sparse block by its number; see ``__call__``.

        The loss of a training step is the loss of the logits plus the auxiliary loss of every
        sparse block, which balances the load of its experts:

            logits, records = model.forward(images, train=True, key=key)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            loss += sum(record.aux_loss for record in records.values())

        Args:
            decide: for some blocks, a function that replaces the router.
        """
        forks.check()
        if train and key is None:
            key = self._next_key()
        tokens, records = self.encode(
            images,
            key if train else None,
            valid=valid,
            class_token_only=self.config.class_token_last,
            decide=decide,
        )
        return self.head(self.pool(tokens)), records

    def train(self, **attributes: object) -> None:
        """Raises an error, as does ``eval``: use the argument ``train`` of a call instead."""
        raise UsageError(
            "model.train() and model.eval() have no effect: call model(images, train=True, "
            "key=...) for noise and dropout, model(images) without"
        )

    eval = train

    @jax.named_scope("embed")
    def embed(self, images: Images, key: MaybeKey = None) -> Float[Array, "b n d"]:
        """The class token, if any, and the patch embeddings, plus position embeddings.

        The registers are put before the patches. All are normalized if the config has ``pre_norm``.
        """
        patches = self.patches(jnp.asarray(images, self.config.dtype))
        _, i, j, _ = patches.shape
        if i != j:
            for block in self.blocks:
                if isinstance(block.mlp, MoE) and "positions" in block.mlp.experts.asks:
                    raise UsageError(
                        f"images of {i} x {j} patches: experts that ask for positions, such as "
                        "cnn, need a square grid; use square images"
                    )
        tokens = rearrange(patches, "b i j d -> b (i j) d")
        if self.class_token is not None:
            token = self.class_token[...].astype(tokens.dtype)
            tokens = jnp.concatenate([repeat(token, "1 1 d -> b 1 d", b=len(images)), tokens], 1)
        tokens += self.positions(i, j).astype(tokens.dtype)
        if self.registers is not None:
            registers = self.registers[...].astype(tokens.dtype)
            registers = repeat(registers, "1 r d -> b r d", b=len(images))
            parts = jnp.split(tokens, [int(self.config.has_class_token)], axis=1)
            tokens = jnp.concatenate([parts[0], registers, parts[1]], axis=1)
        tokens = self.dropout(tokens, deterministic=key is None, rngs=key)
        return tokens if self.pre_norm is None else self.pre_norm(tokens)

    def rotation(self, images: Images | None = None) -> Float[Array, "2 n _ z"] | None:
        """What rotary positions need for images of this size; None without them.

        Args:
            images: if None, images of the config's size.
        """
        config = self.config
        if config.rotary is None:
            return None
        h, w = (config.image_size,) * 2 if images is None else images.shape[1:3]
        i, j = h // config.patch_size, w // config.patch_size
        a, z = config.num_heads, config.dim_per_head
        return rotation(config.rotary, i, j, a, z, config.prefix_tokens)

    def encode(
        self,
        images: Images,
        key: MaybeKey = None,
        *,
        valid: Valid | None = None,
        class_token_only: bool = False,
        decide: Mapping[int, Route] | None = None,
    ) -> tuple[Float[Array, "b x d"], dict[int, Record]]:
        """The tokens after all blocks and ``last_norm``, and the records of blocks by number.

        Args:
            key: for noise and dropout; there are none if it is None.
            valid: see ``__call__``.
            class_token_only: return only the first token of each image, and skip work in the last
                block that cannot change it. Its values are the same, except for the random draws
                of dropout.
            decide: see ``forward``.
        """
        records = {}
        every = self.run_blocks(
            images, key, valid=valid, class_token_only=class_token_only, decide=decide
        )
        for i, (_, outputs) in enumerate(every):
            if outputs.record is not None:
                records[i] = outputs.record
        return self.last_norm(outputs.tokens), records

    def run_blocks(
        self,
        images: Images,
        key: MaybeKey = None,
        *,
        valid: Valid | None = None,
        class_token_only: bool = False,
        decide: Mapping[int, Route] | None = None,
    ) -> Iterator[tuple[Float[Array, "b n d"], BlockOutputs]]:
        """The tokens before each block, and its outputs, in order; see ``encode``."""
        check_images(images)
        self.placement.check_batch(len(images))
        if valid is None:
            valid = jnp.ones(len(images), bool)
        check_mask("valid", valid, (len(images),))
        valid = jnp.asarray(valid)
        if others := sorted(set(decide or ()) - set(self.config.sparse_blocks)):
            raise UsageError(
                f"decide for blocks {others}, which are not sparse: use any of "
                f"{list(self.config.sparse_blocks)}"
            )
        embed_key, blocks_key = keys.split(key, 2)
        tokens, rotation = self.embed(images, embed_key), self.rotation(images)
        last, deciders = len(self.blocks) - 1, decide or {}
        for i, block_key in enumerate(keys.split(blocks_key, len(self.blocks))):
            only = class_token_only and i == last
            outputs = self.run_block(
                i, tokens, valid, block_key, rotation, class_token_only=only, decide=deciders.get(i)
            )
            yield tokens, outputs
            tokens = outputs.tokens

    def run_block(
        self,
        i: int,
        tokens: Float[Array, "b n d"],
        valid: Bool[Array, "b"],
        key: MaybeKey,
        rotation: Float[Array, "2 n _ z"] | None,
        *,
        class_token_only: bool = False,
        decide: Route | None = None,
    ) -> BlockOutputs:
        """The outputs of block i; see ``Block``."""
        run = functools.partial(Block.__call__, class_token_only=class_token_only, decide=decide)
        run = functools.partial(rematerialized, run) if self.config.remat else run
        with jax.named_scope(f"block{i}"):
            return run(self.blocks[i], self.placement.images(tokens), valid, key, rotation)

    def last_norm(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
        """The norm after the last block; the same tokens if it follows the pooling."""
        return tokens if self.config.fc_norm else self.norm(tokens)

    @jax.named_scope("pool")
    def pool(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b d"]:
        """The features of each image, see ``ViTConfig.pooling``."""
        patches = tokens[:, self.config.prefix_tokens :]
        if self.attention_pool is not None:
            pooled = self.attention_pool(patches)
        elif self.config.pooling == "class_token":
            pooled = tokens[:, 0]
        else:
            pooled = patches.mean(axis=1)
        return self.norm(pooled) if self.config.fc_norm else pooled

    def forward_features(self, images: Images) -> Float[Array, "b n d"]:
        """The tokens before pooling: class token, registers, patches, as in timm."""
        return self.encode(images)[0]

    def forward_head(
        self, tokens: Float[Array, "b n d"], *, pre_logits: bool = False
    ) -> Float[Array, "b x"]:
        """Pools the tokens of ``forward_features``, and returns logits, as in timm.

        Args:
            pre_logits: return the inputs of the last linear layer instead.
        """
        pooled = self.pool(as_tokens(tokens))
        return self.head.features(pooled) if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        images: Images,
        *,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        as_grid: bool = False,
    ) -> list[Float[Array, "b n d"]] | list[Float[Array, "b i j d"]]:
        """The patches' tokens after some blocks, without the class token.

        Like timm's method with ``intermediates_only=True``, which is not timm's default.

        Args:
            indices: block numbers (negative numbers count from the last block), or one number n
                for the last n blocks; all blocks if None.
            norm: apply the last norm to each output, unless the norm follows the pooling.
            as_grid: restore the grid of patches.
        """
        chosen = _block_indices(indices, self.config.depth)
        first, p = self.config.prefix_tokens, self.config.patch_size
        outputs = {}
        for i, (_, (tokens, *_)) in enumerate(self.run_blocks(images)):
            if i in chosen:
                tokens = (self.last_norm(tokens) if norm else tokens)[:, first:]
                outputs[i] = (
                    rearrange(tokens, "b (i j) d -> b i j d", i=images.shape[1] // p)
                    if as_grid
                    else tokens
                )
            if i == max(chosen):
                break
        return [outputs[i] for i in chosen]

    def reset_classifier(self, num_classes: int, *, seed: int = 0) -> None:
        """Replaces the last layer by a new one, as in timm; 0 classes: no last layer."""
        self.config = replace(self.config, num_classes=num_classes)
        dtype = jnp.dtype(self.config.dtype)
        self.head.classes = Head(self.config, dtype=dtype, rngs=nnx.Rngs(seed)).classes

    def _next_key(self) -> jax.Array:
        try:
            return self.rngs.train()
        except TraceContextError:
            raise UsageError(
                "model(images, train=True) inside jax.jit: give key=jax.random.key(...), since the "
                "model's own random stream cannot advance there"
            ) from None


def _block_indices(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        indices = range(-indices, 0)
    chosen = [i + depth if i < 0 else i for i in indices]
    if not chosen or not all(0 <= i < depth for i in chosen):
        raise UsageError(f"give blocks of 0 to {depth - 1}, or how many", indices=indices)
    return chosen
