"""The sparse layer: group, route, dispatch, experts, combine, ungroup."""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.axes import Record
from vmoe.config import MoEConfig, Soft
from vmoe.nn import keys
from vmoe.nn.experts import Experts
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.nn.routers import Router, SoftRouter
from vmoe.routing.layout import combine, dispatch


class MoE(nnx.Module):
    """Mixture of experts in place of an MLP (V-MoE, section 2)."""

    def __init__(
        self,
        width: int,
        hidden: int,
        tokens: int,
        config: MoEConfig,
        *,
        dtype: jax.typing.DTypeLike,
        rngs: Rngs,
    ):
        """``tokens`` of an image: a soft router's slots are parameters, counted by them."""
        self.images_per_group = config.images_per_group
        self.round_transfers = config.transfer_dtype == "bfloat16"
        if isinstance(config.router, Soft):
            self.router = SoftRouter(width, tokens, config, rngs=rngs)
        else:
            self.router = Router(width, config, rngs=rngs)
        self.experts = Experts(
            config.experts,
            width,
            hidden,
            dropout=config.expert_dropout,
            shared_init=config.shared_init,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self, tokens: Float[Array, "b n d"], valid: Bool[Array, "b"], key: MaybeKey = None
    ) -> tuple[Float[Array, "b n d"], Record]:
        """The experts' weighted outputs for every token, and the record of the routing.

        Args:
            valid: False for images that only pad the batch.
        """
        router_key, experts_key = keys.split(key, 2)
        groups, group_valid = group(tokens, valid, self.images_per_group)
        record = self.router(groups, group_valid, router_key)
        slots = self._transfer(dispatch(self._transfer(groups), record.routing))
        outputs = self.experts(slots.astype(tokens.dtype), experts_key)
        groups = combine(self._transfer(outputs), record.routing).astype(tokens.dtype)
        return ungroup(groups, len(tokens), tokens.shape[1]), record

    def _transfer(self, rows: jax.Array) -> jax.Array:
        """Rows as they travel: rounded to bfloat16 if the config says so."""
        return rows.astype(jnp.bfloat16) if self.round_transfers else rows


def group(
    tokens: Float[Array, "b n d"], valid: Bool[Array, "b"], images_per_group: int
) -> tuple[Float[Array, "g s d"], Bool[Array, "g s"]]:
    """Images in groups whose tokens compete for slots, padded where they do not fill the last.

    Returns:
        the tokens of each group, and False for those that are padding.
    """
    b, n, _ = tokens.shape
    g, i = group_sizes(b, images_per_group)
    missing = g * i - b
    tokens = jnp.pad(tokens, ((0, missing), (0, 0), (0, 0)))
    valid = jnp.pad(valid, (0, missing))
    return (
        rearrange(tokens, "(g i) n d -> g (i n) d", g=g),
        repeat(valid, "(g i) -> g (i n)", g=g, n=n),
    )


def group_sizes(b: int, images_per_group: int) -> tuple[int, int]:
    """How many groups b images form, and of how many images each: as even as possible.

    ceil(b / images_per_group) groups; where images_per_group divides b, the paper's grouping.

    >>> group_sizes(20, 8)
    (3, 7)
    """
    g = -(-b // images_per_group)
    return g, -(-b // g)


def ungroup(groups: Float[Array, "g s d"], b: int, n: int) -> Float[Array, "b n d"]:
    """The tokens of b images of n tokens out of their groups: ``group`` undone."""
    return rearrange(groups, "g (i n) d -> (g i) n d", n=n)[:b]
