"""Multi-head attention, from Flax, with the published model's initialization."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe.nn.keys import MaybeKey, Rngs


class Attention(nnx.MultiHeadAttention):
    """Multi-head attention from queries to tokens; self-attention if only one of the two is given.

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
            decode=False,
            keep_rngs=False,
            rngs=rngs,
        )

    @jax.named_scope("attention")
    def __call__(
        self,
        queries: Float[Array, "b q d"],
        tokens: Float[Array, "b n d"] | None = None,
        *,
        key: MaybeKey = None,
        mask: Bool[Array, "b 1 q n"] | None = None,
    ) -> Float[Array, "b q d"]:
        """The outputs for the queries.

        Args:
            mask: True where a query may attend to a token; everywhere if None.
        """
        rngs = None if key is None else nnx.Rngs(dropout=key)
        return super().__call__(queries, tokens, mask=mask, deterministic=key is None, rngs=rngs)

    def weights(
        self, queries: Float[Array, "b q d"], tokens: Float[Array, "b n d"] | None = None
    ) -> Float[Array, "b a q n"]:
        """The attention weights by head: float32, sum to 1 over the tokens.

        A call of the module does not compute them if it uses a fused kernel.
        """
        query, key = self.query(queries), self.key(queries if tokens is None else tokens)
        if self.normalize_qk:
            query, key = self.query_ln(query), self.key_ln(key)
        logits = jnp.einsum("bqaz,bnaz->baqn", query, key, preferred_element_type=jnp.float32)
        return jax.nn.softmax(logits / query.shape[-1] ** 0.5)
