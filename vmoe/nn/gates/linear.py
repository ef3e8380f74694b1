"""The linear gate of V-MoE: tokens to router logits, always in float32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Key

from vmoe import routing
from vmoe.axes import Decision, Record
from vmoe.config import AuxLossWeights, MoEConfig
from vmoe.nn import keys
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.routing import aux_losses
from vmoe.sharding import ONE_DEVICE, Placement


def noise(key: Key[Array, ""], shape: tuple[int, ...], std: float) -> Float[Array, "g s e"]:
    """The router's noise in training: N(0, (std / e)^2) for logits (g, s, e).

    Source: V-MoE section 2.1, equation 2 (std = 1).
    """
    return jax.random.normal(key, shape) * (std / shape[-1])


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
        self.kernel = nnx.Param(init(rngs.params(), (width, config.num_experts), jnp.float32))

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


def _record(
    logits: Float[Array, "g s e *c"],
    decision: Decision,
    valid: Bool[Array, "g s"],
    config: MoEConfig,
) -> Record:
    """The decisions of all groups with what is use_ema over them."""
    weights = getattr(config.router, "balance", AuxLossWeights())
    total = aux_losses.total(decision.losses, weights, valid)
    return Record(logits, *decision, total, valid)
