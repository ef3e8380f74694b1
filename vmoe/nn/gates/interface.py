"""The interface of gates."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from vmoe.config import AnyRouter, MoEConfig
from vmoe.errors import UsageError
from vmoe.nn.experts.interface import OF_LAYER, OF_TOKENS, names_taken
from vmoe.nn.inputs import taking
from vmoe.nn.keys import MaybeKey, Rngs
from vmoe.routing.groups import Groups


class NoisyLogits(NamedTuple):
    """The outputs of a gate that determines the noise of its logits.

    Attributes:
        logits: the logits, without noise.
        noise_std: standard deviation of the noise in training; None for no noise.
    """

    logits: Float[Array, "b n e *c"]
    noise_std: Float[Array, "b n e *c"] | float | None


class Gate(Protocol):
    """The interface of a gate that a config names.

    Any gate can have a tuple ``takes``, and gets by these names:

    - "mask", "images", "positions": arrays (b, n) about the tokens, see ``OF_TOKENS``.
    - "n", "s": the number of tokens of an image and of a group.
    - "key": a key of its own; None in evaluation.
    - any other name: an input per token that the caller of the layer gives, for the gate alone.
    """

    def __init__(self, width: int, tokens: int, config: MoEConfig, *, rngs: Rngs):
        """``tokens``: number of tokens per image, for gates whose slots depend on it."""

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "b n e *c"] | NoisyLogits:
        """The logits, without noise; ours are float32, at the highest precision."""


def inputs_of_gate(gate: Any, per_token: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs per token that the gate names."""
    own = set(names_taken(gate, "the gate's takes")).difference(OF_TOKENS, OF_LAYER)
    if missing := ", ".join(sorted(own - per_token.keys())):
        raise UsageError(
            f"the gate takes {missing}: give per_token={{...}} with a row for each token; from the "
            f"layer it gets {', '.join((*OF_TOKENS, *OF_LAYER))}"
        )
    return {name: per_token[name] for name in own}


def inputs_of_router(router: AnyRouter, per_token: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs per token that the router names."""
    name = type(router).__name__
    own = names_taken(router, f"{name}.takes")
    if missing := ", ".join(sorted(set(own) - per_token.keys())):
        raise UsageError(
            f"{name} takes {missing}: give per_token={{...}} with a row for each token"
        )
    return {name: per_token[name] for name in own}


def about_tokens(
    gate: Any, mask: Bool[Array, "b n"], groups: Groups, key: MaybeKey
) -> dict[str, Any]:
    """What a gate asks about the tokens, by name; see ``Gate``."""
    b, n = mask.shape
    known: dict[str, Callable[[], Any]] = {
        "mask": lambda: mask,
        "images": lambda: jnp.broadcast_to(jnp.arange(b)[:, None], (b, n)),
        "positions": lambda: jnp.broadcast_to(jnp.arange(n), (b, n)),
        "n": lambda: n,
        "s": lambda: groups.s,
        "key": lambda: None if key is None else jax.random.fold_in(key, 2),
    }
    return {name: known[name]() for name in getattr(gate, "takes", ()) if name in known}


def logits_of(
    gate: Any,
    router: AnyRouter,
    e: int,
    images: Float[Array, "b n d"],
    key: MaybeKey,
    inputs: Mapping[str, Any],
) -> NoisyLogits:
    """The gate's logits, with noise as the gate says or else the router.

    Args:
        key: for the router's jitter; None in evaluation.
        inputs: what the gate takes besides, by name.
    """
    if router.jitter and key is not None:
        low, high = 1 - router.jitter, 1 + router.jitter
        jitter_key = jax.random.fold_in(key, 1)  # the gate may add noise of its own
        images = images * jax.random.uniform(jitter_key, images.shape, jnp.float32, low, high)
    with taking("the gate", images.shape):
        outputs = jax.named_scope("gate")(gate)(images, **inputs)
        if isinstance(outputs, NoisyLogits) and outputs.noise_std is not None:
            noise_std = jnp.broadcast_to(outputs.noise_std, outputs.logits.shape)
            outputs = outputs._replace(noise_std=noise_std)
    if not isinstance(outputs, NoisyLogits):
        outputs = NoisyLogits(outputs, router.noise_std / e if router.noise_std else None)
    shape = getattr(outputs.logits, "shape", ())
    axes = "b n e c" if router.logits_per == "slot" else "b n e"
    if len(shape) != len(axes.split()) or shape[:3] != (*images.shape[:2], e):
        raise UsageError(
            f"the gate makes logits {shape} from tokens {images.shape}: the {router.kind} router "
            f"needs ({axes.replace(' ', ', ')}) with e = {e}"
        )
    wide = jnp.result_type(outputs.logits, jnp.float32)
    return outputs._replace(logits=outputs.logits.astype(wide))
