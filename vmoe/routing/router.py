"""The interface of routers, each of which is a class in a file of its own."""

import dataclasses
from typing import Any

from jaxtyping import Array, Float, Shaped

from vmoe.axes import Decision, RouterInputs
from vmoe.fields import Checked, kinds
from vmoe.routing import aux_losses
from vmoe.routing.aux_losses import BALANCING, NO_LOSSES, AuxLossWeights
from vmoe.routing.capacity import Limits, rounded_capacity
from vmoe.routing.priority import Priority

State = dict[str, Shaped[Array, "..."]]
"""Arrays by name: the state of a router, or sums over a batch."""


class Router(Checked):
    """Decides which tokens go to which experts, and with which weights.

    Yours is a subclass in a file of your own: a frozen dataclass whose fields are its settings,
    with the function ``__call__``. Whatever else differs from this class it overrides: by a field
    if users choose the value, and by a class attribute or a property if not. To be written to the
    config of a run it has a name, the field ``kind: Literal["mine"] = "mine"``.

    Attributes:
        logits_per: the logits that the router reads: "expert" for logits (g, s, e); "slot" for (g,
            s, e, c), where slots are parameters of the gate and each is a mixture of all tokens of
            an image; None for a router that decides by a fixed rule, whose layer has no gate.
        can_drop: whether tokens choose their experts, so that a choice can be dropped.
        without_scatters: as ``__call__`` in evaluation, for groups without padding, with a
            ``SoftRouting`` as the result (``one_hot.py``); None if ONNX files cannot have the
            router.
    """

    section = "model.moe.router"
    logits_per: str | None = "expert"
    can_drop: bool = True
    without_scatters: Any = None

    @property
    def kind(self) -> str:
        """The name of the router in configs."""
        return type(self).__name__

    @property
    def takes(self) -> tuple[str, ...]:
        """The ``RouterInputs`` that the layer makes for this router: "draw", "positions"."""
        return ("draw",) if self.priority == "random" else ()

    @property
    def k(self) -> int:
        """Choices of each token; a capacity factor counts slots per token and choice."""
        return 1

    @property
    def priority(self) -> Priority:
        """Order in which tokens get slots."""
        return "order"

    @property
    def noise_std(self) -> float:
        """e times the standard deviation of the noise on the logits in training."""
        return 0.0

    @property
    def jitter(self) -> float:
        """The gate's tokens are multiplied in training by random numbers in 1 +- jitter."""
        return 0.0

    @property
    def normalized(self) -> bool:
        """Whether a token's combine weights sum to 1, before any choice is dropped."""
        return False

    @property
    def weights_are_gates(self) -> bool:
        """Whether a token's combine weights are the gates of its experts, before normalization."""
        return True

    @property
    def aux_loss(self) -> AuxLossWeights:
        """The weights of our auxiliary losses; a loss of another name has weight 1."""
        return NO_LOSSES

    @property
    def balanced_by(self) -> str | None:
        """What balances the load in training, for advice to users; None if nothing does."""
        losses = [name for name in BALANCING if getattr(self.aux_loss, name)]
        if not losses:
            return None
        return f"weight of the {' and '.join(losses)} loss{'es' * (len(losses) > 1)}"

    @property
    def learned(self) -> bool:
        """Whether the layer has a gate, which is trained."""
        return self.logits_per is not None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """A router is read and written by its kind; each call sees the classes there are by now."""
        if "kind" in cls.__dataclass_fields__:
            return handler(source)
        known = {kind: handler.generate_schema(router) for kind, router in kinds(cls).items()}
        return {"type": "tagged-union", "choices": known, "discriminator": "kind"}

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        """Routes every group independently.

        Args:
            c: number of slots of each expert.
        """
        raise NotImplementedError

    def capacity(self, limits: Limits, s: int) -> int:
        """Slots per expert in a group of s tokens: s * k * capacity_factor / e, rounded; at most s.

        A dropless layer has s slots, enough for all tokens.
        """
        if limits.dropless:
            return s
        ideal = s * self.k * limits.capacity_factor / limits.num_experts
        return min(s, rounded_capacity(ideal, limits))

    def losses(
        self, inputs: RouterInputs, noisy: Float[Array, "g s e"], gates: Float[Array, "g s e"]
    ) -> dict[str, Float[Array, "g"]]:
        """Our auxiliary losses whose weight is not 0, by name, unweighted.

        Args:
            noisy: the logits that the routing used.
            gates: the gates that the routing used.
        """
        weights = self.aux_loss
        return aux_losses.losses(weights, inputs, noisy, gates, k=self.k, noise_std=self.noise_std)

    def initial_state(self, e: int) -> State:
        """The state of a new layer with e experts; empty if the router has none.

        State is no parameter: no gradient reaches it, and it is constant in evaluation.
        """
        return {}

    def next_state(self, state: State, sums: State) -> State:
        """The state after a step of training.

        Args:
            sums: ``Decision.sums``, added up over the groups of all devices, with "choices", i32
                (e,), the number of choices of each expert before any is dropped, and "tokens", the
                number of tokens without padding.
        """
        return state

    def has(self, setting: str) -> bool:
        """Whether users choose a setting of this router: whether it is a field."""
        return any(field.name == setting for field in dataclasses.fields(self))
