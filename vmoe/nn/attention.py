"""Multi-head attention: Flax's, with the published model's initialization, rotation and a norm."""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.config.rotary import Rotary
from vmoe.errors import UsageError
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.nn.positions import rotate


class Attention(nnx.MultiHeadAttention):
    """Multi-head attention from queries to tokens; self-attention if only one of the two is given.

    Queries and keys can be rotated (``vmoe.nn.positions``), the outputs of the heads normalized.

    Dropout masks are independent for each image and head, as in the published model.
    Parameters: ``query``, ``key``, ``value`` kernels (d, a, z), ``out`` kernel (a, z, d).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        qk_norm: bool = False,
        rotary: Rotary | None = None,
        norm: nnx.Module | None = None,
        dtype: jax.typing.DTypeLike | None,
        rngs: Rngs,
    ):
        super().__init__(
            num_heads,
            width,
            dropout_rate=dropout,
            broadcast_dropout=False,
            normalize_qk=qk_norm,
            kernel_init=nnx.initializers.xavier_uniform(),
            dtype=dtype,
            keep_rngs=False,
            rngs=rngs,
        )
        self.rotary = rotary
        self.norm = norm

    @jax.named_scope("attention")
    def __call__(
        self,
        queries: Float[Array, "b q d"],
        tokens: Float[Array, "b n d"] | None = None,
        *,
        key: MaybeKey = None,
        mask: Bool[Array, "b 1 q n"] | None = None,
        rotation: Float[Array, "2 n z"] | None = None,
    ) -> Float[Array, "b q d"]:
        """The outputs for the queries.

        Args:
            mask: True where a query may attend to a token; everywhere if None.
            rotation: of the tokens, of which the queries are the first.
        """
        tokens = queries if tokens is None else tokens
        drops = key is not None and self.dropout_rate > 0
        heads = nnx.dot_product_attention(
            *self._queries_and_keys(queries, tokens, rotation),
            self.value(tokens),
            mask=mask,
            dropout_rng=nnx.Rngs(dropout=key).dropout() if drops else None,
            dropout_rate=self.dropout_rate,
            broadcast_dropout=self.broadcast_dropout,
            deterministic=not drops,
            dtype=self.dtype,
        )
        if self.norm is not None:
            flat = self.norm(rearrange(heads, "b q a z -> b q (a z)"))
            heads = rearrange(flat, "b q (a z) -> b q a z", a=self.num_heads)
        return self.out(heads)

    def weights(
        self,
        queries: Float[Array, "b q d"],
        tokens: Float[Array, "b n d"] | None = None,
        rotation: Float[Array, "2 n z"] | None = None,
    ) -> Float[Array, "b a q n"]:
        """The attention weights by head: float32, sum to 1 over the tokens.

        A call of the module does not compute them if it uses a fused kernel.

        Args:
            rotation: see ``__call__``.
        """
        tokens = queries if tokens is None else tokens
        query, key = self._queries_and_keys(queries, tokens, rotation)
        logits = jnp.einsum("bqaz,bnaz->baqn", query, key, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits / query.shape[-1] ** 0.5)

    def _queries_and_keys(
        self,
        queries: Float[Array, "b q d"],
        tokens: Float[Array, "b n d"],
        rotation: Float[Array, "2 n z"] | None,
    ) -> tuple[Float[Array, "b q a z"], Float[Array, "b n a z"]]:
        query, key = self.query(queries), self.key(tokens)
        if self.normalize_qk:
            query, key = self.query_ln(query), self.key_ln(key)
        if self.rotary is not None:
            if rotation is None:
                raise UsageError("rotary positions need rotation=model.rotation(images)")
            query, key = (rotate(each, rotation, self.rotary) for each in (query, key))
        return query, key
