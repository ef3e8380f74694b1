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

    Queries and keys can be rotated (``vmoe.nn.positions``), the outputs of the heads normalized,
    and each head can have a sink, see ``ViTConfig.attention_sink``.

    Dropout masks are independent for each image and head, as in the published model.
    Parameters: ``query``, ``key``, ``value`` kernels (d, a, z), ``out`` kernel (a, z, d), ``sink``
    (a,).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        dropout: float = 0.0,
        head_dim: int | None = None,
        qk_norm: bool = False,
        qk_rms: bool = False,
        sink: bool = False,
        rotary: Rotary | None = None,
        norm: nnx.Module | None = None,
        dtype: jax.typing.DTypeLike | None,
        rngs: Rngs,
    ):
        super().__init__(
            num_heads,
            width,
            qkv_features=num_heads * (head_dim or width // num_heads),
            out_features=width,
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
        self.qk_rms = qk_rms
        self.sink = nnx.Param(jnp.zeros(num_heads)) if sink else None

    @jax.named_scope("attention")
    def __call__(
        self,
        queries: Float[Array, "b q d"],
        tokens: Float[Array, "b n d"] | None = None,
        *,
        key: MaybeKey = None,
        mask: Bool[Array, "b 1 q n"] | None = None,
        rotation: Float[Array, "2 n _ z"] | None = None,
    ) -> Float[Array, "b q d"]:
        """The outputs for the queries.

        Args:
            mask: True where a query may attend to a token; everywhere if None.
            rotation: of the tokens, of which the queries are the first.
        """
        tokens = queries if tokens is None else tokens
        drops = key is not None and self.dropout_rate > 0
        query, keys = self._queries_and_keys(queries, tokens, rotation)
        values, bias = self.value(tokens), None
        if self.sink is not None:  # a further token with value 0, to which the logit is the sink
            keys, values = (
                jnp.concatenate([x, jnp.zeros_like(x[:, :1])], axis=1) for x in (keys, values)
            )
            sink = self.sink[...].astype(query.dtype)[:, None, None]
            bias = jnp.pad(sink, ((0, 0), (0, 0), (tokens.shape[1], 0)))[None]
            if mask is not None:
                mask = jnp.pad(mask, ((0, 0), (0, 0), (0, 0), (0, 1)), constant_values=True)
        heads = nnx.dot_product_attention(
            query,
            keys,
            values,
            bias=bias,
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
        rotation: Float[Array, "2 n _ z"] | None = None,
    ) -> Float[Array, "b a q n"]:
        """The attention weights by head: float32, sum to 1 over the tokens and the sink, if any.

        A call of the module does not compute them if it uses a fused kernel.

        Args:
            rotation: see ``__call__``.
        """
        tokens = queries if tokens is None else tokens
        query, key = self._queries_and_keys(queries, tokens, rotation)
        logits = jnp.einsum("bqaz,bnaz->baqn", query, key, preferred_element_type=jnp.float32)
        logits /= query.shape[-1] ** 0.5
        if self.sink is None:
            return jax.nn.softmax(logits)
        sink = jnp.broadcast_to(self.sink[...][:, None, None], (*logits.shape[:3], 1))
        return jax.nn.softmax(jnp.concatenate([logits, sink], axis=-1))[..., :-1]

    def _queries_and_keys(
        self,
        queries: Float[Array, "b q d"],
        tokens: Float[Array, "b n d"],
        rotation: Float[Array, "2 n _ z"] | None,
    ) -> tuple[Float[Array, "b q a z"], Float[Array, "b n a z"]]:
        query, key = self.query(queries), self.key(tokens)
        if self.normalize_qk:
            query, key = self.query_ln(query), self.key_ln(key)
        if self.qk_rms:
            query, key = map(_rms_normalized, (query, key))
        if self.rotary is not None:
            if rotation is None:
                raise UsageError("rotary positions need rotation=model.rotation(images)")
            query, key = (rotate(each, rotation, self.rotary) for each in (query, key))
        return query, key


def _rms_normalized(heads: Float[Array, "b n a z"]) -> Float[Array, "b n a z"]:
    """Heads divided by their root mean squares; the epsilon is that of float32, as in PyTorch."""
    wide = heads.astype(jnp.float32)
    squares = jnp.square(wide).mean(axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(squares + jnp.finfo(jnp.float32).eps)).astype(heads.dtype)
