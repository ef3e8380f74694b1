"""Functions that decide instead of a router, for "what if" questions about a trained model.

    capture(model, images, decide={3: ablated(active)})

The parameters of the model stay as they are. Arguments may be traced arrays, so that one compiled
program serves all their values. ``inner`` is the router to change; None is the layer's own router.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from vmoe.axes import Decision, Route, RouterInputs, Routing
from vmoe.config.routing_file import check_comparable
from vmoe.routing import token_choice
from vmoe.routing.priority import PRIORITIES
from vmoe.routing.router import AnyRouter
from vmoe.routing.top_k import MASKED


def _own(inputs: RouterInputs, router: AnyRouter, c: int) -> Decision:
    """The layer's own decision."""
    return router(inputs, c)


def ablated(active: Bool[Array, "e"], inner: Route | None = None) -> Route:
    """The decision of ``inner``, but inactive experts output zero.

    Tokens still go to inactive experts, and take slots there.
    """

    def decide(inputs: RouterInputs, router: AnyRouter, c: int) -> Decision:
        decision = (inner or _own)(inputs, router, c)
        routing = decision.routing
        if isinstance(routing, Routing):
            of_choice = jnp.append(active, False)[routing.experts]  # e stands for no expert
            routing = routing._replace(weights=jnp.where(of_choice, routing.weights, 0.0))
        else:
            routing = routing._replace(combine=jnp.where(active[:, None], routing.combine, 0.0))
        return decision._replace(routing=routing)

    return decide


def masked(choosable: Bool[Array, "e"], inner: Route | None = None) -> Route:
    """The decision of ``inner`` with some experts masked: their gates are zero.

    Their tokens go to other experts. At least one expert must be choosable. If fewer than k are
    choosable, or with expert choice, masked experts still receive tokens, but with weight 0.
    """

    def decide(inputs: RouterInputs, router: AnyRouter, c: int) -> Decision:
        slots = (1,) * (inputs.logits.ndim - 3)
        logits = jnp.where(choosable.reshape(-1, *slots), inputs.logits, MASKED)
        return (inner or _own)(inputs._replace(logits=logits), router, c)

    return decide


def randomized(
    key: jax.Array, apply: Bool[Array, ""] | bool = True, inner: Route | None = None
) -> Route:
    """The decision of ``inner`` on random logits, which are the same in every batch.

    Their standard deviation is taken from the gate's logits. Use one device: several would draw the
    same logits.

    Args:
        apply: False to use the gate's logits.
    """

    def decide(inputs: RouterInputs, router: AnyRouter, c: int) -> Decision:
        real = inputs.valid.reshape(*inputs.valid.shape, *(1,) * (inputs.logits.ndim - 2))
        drawn = inputs.logits.std(where=real) * jax.random.normal(key, inputs.logits.shape)
        logits = jnp.where(apply, drawn, inputs.logits)
        return (inner or _own)(inputs._replace(logits=logits), router, c)

    return decide


def limited(
    slots: Int[Array, ""], priority: Int[Array, ""], k: Int[Array, ""] | None = None
) -> Route:
    """The router with fewer slots, with another priority, and with fewer experts per token.

    Tokens must choose their experts. It equals the router with ``capacity=slots`` and ``k``, for
    any values up to the layer's own, but has no auxiliary losses.

    Args:
        slots: slots per expert and group; with 0 every choice is dropped.
        priority: number of a priority in ``vmoe.routing.priority.PRIORITIES``.
        k: experts per token; the layer's k if None.

    Raises:
        UsageError: the returned function is called for a router that ``check_comparable`` refuses.
    """

    def decide(inputs: RouterInputs, router: AnyRouter, c: int) -> Decision:
        _, s, e = inputs.logits.shape[:3]
        check_comparable(router)
        decision = router(inputs, s)  # a slot for every choice
        gates, routing = decision.gates, decision.routing
        assert isinstance(routing, Routing)
        assign = functools.partial(
            token_choice.assign_chosen,
            jnp.take_along_axis(gates, jnp.minimum(routing.experts, e - 1), axis=-1),
            routing.experts,
            inputs.valid,
            weights=routing.weights,
            e=e,
            c=c,
            normalize=router.normalized and k is not None,
            draw=inputs.draw,
            ranks=k,
        )
        branches = [functools.partial(assign, priority=name) for name in PRIORITIES]
        routing = jax.lax.switch(priority, branches)
        return Decision(gates, token_choice.first_slots(routing, slots))

    return decide
