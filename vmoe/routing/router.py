"""The interface of routers, each of which is a class in a file of its own."""

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float, Shaped

from vmoe.axes import Decision, RouterInputs, Routing
from vmoe.fields import Checked, kinds, replace
from vmoe.routing import aux_losses
from vmoe.routing.aux_losses import NO_LOSSES, AuxLossWeights, Over
from vmoe.routing.capacity import Capacity
from vmoe.routing.overflow import Overflow
from vmoe.routing.priority import Priority

State = dict[str, Shaped[Array, "..."]]
"""Arrays by name: the state of a router, or sums over a batch."""


@dataclasses.dataclass(frozen=True)
class AnyRouter(Checked):
    """Decides which tokens go to which experts, and with which weights.

    A router is a frozen dataclass, whose fields are its settings. Whatever else differs from this
    class it overrides: by a field if users choose the value, and by a class attribute or a property
    if not. Most routers are a ``Router``.

    Attributes:
        logits_per: the logits that the router reads: "expert" for logits (g, s, e); "slot" for (g,
            s, e, c), where slots are parameters of the gate and each is a mixture of all tokens of
            an image; None for a router that decides by a fixed rule, whose layer has no gate.
        takes: names of inputs per token that the router reads, see ``MoE.forward``.
    """

    section = "model.moe.router"
    logits_per: ClassVar[str | None] = "expert"
    takes: ClassVar[tuple[str, ...]] = ()

    kind: str = ""
    """The name of the router in configs."""

    @property
    def k(self) -> int:
        """Choices of each token; a capacity factor counts slots per token and choice."""
        return 1

    @property
    def priority(self) -> Priority:
        """Order in which tokens get slots."""
        return "order"

    @property
    def capacity_factor(self) -> float:
        """Slots of all experts for each choice, before rounding."""
        return 1.0

    @property
    def capacity(self) -> int | None:
        """Slots per expert and group, if they are fixed."""
        return None

    def in_evaluation(self) -> "AnyRouter":
        """The router as it is in evaluation, if its settings differ there."""
        return self

    def with_slots(self, **setting: Any) -> "AnyRouter":
        """The router with other slots, in training and evaluation.

        Args:
            setting: ``capacity_factor``, ``capacity`` or ``dropless``, which replaces the others.
        """
        every = {"eval_capacity_factor": None, "capacity": None, "dropless": False} | setting
        return replace(self, **{name: x for name, x in every.items() if self.has(name)})

    @property
    def images_per_group(self) -> int:
        """Maximum number of images whose tokens compete for slots."""
        return 1

    @property
    def dropless(self) -> bool:
        """Whether every choice is computed, without a capacity."""
        return False

    @property
    def shares(self) -> tuple[float, ...]:
        """The relative load that each expert is to have; empty if all are to have the same."""
        return ()

    @property
    def overflow(self) -> Overflow:
        """What becomes of choices without a free slot."""
        return "drop"

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
    def aux_loss(self) -> AuxLossWeights:
        """The weights of our auxiliary losses; a loss of another name has weight 1."""
        return NO_LOSSES

    @property
    def can_drop(self) -> bool:
        """Whether tokens choose their experts, so that a choice can be dropped."""
        return self.has("dropless")

    @property
    def learned(self) -> bool:
        """Whether the layer has a gate, which is trained."""
        return self.logits_per is not None

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        """A router is read and written by its kind; each call sees the classes there are by now."""
        if cls.kind:
            return handler(source)
        known = {kind: handler.generate_schema(router) for kind, router in kinds(cls).items()}
        return {"type": "tagged-union", "choices": known, "discriminator": "kind"}

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        """Routes every group independently.

        Args:
            c: number of slots of each expert.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__")

    def slots(self, s: int, e: int) -> int:
        """Number of slots of each of e experts in a group of s tokens."""
        raise NotImplementedError

    def decision(
        self,
        inputs: RouterInputs,
        noisy: Float[Array, "g s e"],
        gates: Float[Array, "g s e"],
        routing: Routing,
        *,
        losses: State | None = None,
        sums: State | None = None,
    ) -> Decision:
        """A decision with our auxiliary losses, or the sums for ``losses_of_sums``.

        Args:
            noisy: the logits that the routing used.
            gates: the gates that the routing used.
            losses: further losses by name.
            sums: further sums by name.
        """
        ours, ours_to_sum = aux_losses.losses_and_sums(
            self.aux_loss,
            inputs,
            noisy,
            gates,
            k=self.k,
            noise_std=self.noise_std,
            shares=self.shares,
        )
        return Decision(gates, routing, ours | (losses or {}), ours_to_sum | (sums or {}))

    @property
    def losses_over(self) -> Over:
        """Which ``Decision.sums`` are added up for ``losses_of_sums``."""
        return self.aux_loss.over

    def losses_of_sums(self, sums: State) -> dict[str, Float[Array, ""]]:
        """Auxiliary losses by name over more than a group, unweighted; for ``losses_over``.

        Gradients reach the gate through the sums. With gradient accumulation a batch is one part.

        Args:
            sums: as for ``next_state``, but with ``losses_over`` "device" added up over the groups
                of one device. Not called with "group".
        """
        return aux_losses.losses_of_sums(sums, self.shares)

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


@dataclasses.dataclass(frozen=True)
class Router(Capacity, AnyRouter):
    """A router with which tokens choose their experts; a choice without a free slot is dropped.

    Yours is a subclass in a file of your own: a frozen dataclass with the function ``__call__``. To
    be written to the config of a run it has a name, the field ``kind: Literal["mine"] = "mine"``.
    """

    dropless: bool = False
    """Compute every choice, without a capacity."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("capacity", "eval_capacity_factor"):
            both = self.dropless and getattr(self, name) is not None
            self.require(not both, "give one of them", "dropless", name)

    def slots(self, s: int, e: int) -> int:
        """s * k * capacity_factor / e, rounded; at most s. Without a capacity s, for all tokens."""
        if self.dropless:
            return s
        return min(s, self.rounded(s * self.k * self.capacity_factor / e, e))
