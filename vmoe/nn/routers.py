"""The routers' parameters: what turns tokens into router logits, always in float32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from vmoe import routing
from vmoe.axes import Decision, Record
from vmoe.config import Balance, MoEConfig
from vmoe.nn import keys
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.routing import balance, soft
from vmoe.routing.gates import noise
from vmoe.sharding import ONE_DEVICE, Placement

HIGHEST = jax.lax.Precision.HIGHEST


class Router(nnx.Module):
    """Linear router without bias: kernel (d, e) (V-MoE, section 2.1).

    Where the tokens go is for the file in ``vmoe/routing`` that the config names.
    """

    def __init__(
        self,
        width: int,
        config: MoEConfig,
        *,
        placement: Placement = ONE_DEVICE,
        rngs: Rngs,
    ):
        self.config = config
        self.placement = placement
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (width, config.experts), jnp.float32))

    def __call__(
        self, tokens: Float[Array, "g s d"], valid: Bool[Array, "g s"], key: MaybeKey = None
    ) -> Record:
        logits = jnp.matmul(tokens.astype(jnp.float32), self.kernel[...], precision=HIGHEST)
        noise_key, draw_key = keys.split(key, 2)
        noise, draw = self.noise(logits.shape, noise_key), self.draw(logits.shape[:2], draw_key)
        router = routing.ROUTERS[type(self.config.router)]
        route = self.placement.on_each_device(functools.partial(router.route, config=self.config))
        return _record(logits, route(logits, noise, valid, draw), valid, self.config)

    def noise(self, shape: tuple[int, ...], key: MaybeKey) -> Float[Array, "g s e"] | None:
        """What is added to the logits: nothing in evaluation."""
        std = getattr(self.config.router, "noise_std", 0.0)
        return None if key is None or std == 0 else noise(key, shape, std)

    def draw(self, shape: tuple[int, int], key: MaybeKey) -> Float[Array, "g s"] | None:
        """A random number for each token, where the priority is random; none in evaluation."""
        random = getattr(self.config.router, "priority", "") == "random"
        return jax.random.uniform(key, shape) if random and key is not None else None


class SoftRouter(nnx.Module):
    """Parameters of the slots, kernel (d, e, c), and a scale (Soft MoE, section 2 and 2.3).

    Tokens and slots are normalised over d, so that the logits keep their size at any width.
    """

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        self.config = config
        shape = (width, config.experts, soft.capacity(config, tokens))
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape) * width**-0.5)
        self.scale = nnx.Param(jnp.ones(()))

    def __call__(
        self, tokens: Float[Array, "g s d"], valid: Bool[Array, "g s"], key: MaybeKey = None
    ) -> Record:
        x = _normalized(tokens.astype(jnp.float32), axis=-1)
        mu = self.scale[...] * _normalized(self.kernel[...], axis=0)
        logits = jnp.einsum("gsd,dec->gsec", x, mu, precision=HIGHEST)
        return _record(logits, soft.route(logits, valid), valid, self.config)


def _record(
    logits: Float[Array, "g s e *c"],
    decision: Decision,
    valid: Bool[Array, "g s"],
    config: MoEConfig,
) -> Record:
    """The decisions of all groups with what is averaged over them."""
    weights = getattr(config.router, "balance", Balance())
    total = balance.total(decision.losses, weights, valid)
    return Record(logits, *decision, total, valid)


def _normalized(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.square(x).sum(axis, keepdims=True) + 1e-6)
