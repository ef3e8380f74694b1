"""One dataclass per router, with its settings."""

import dataclasses
from typing import Annotated, Literal, get_args

from vmoe.config.fields import Checked, NonNegative, at_least, less_than

Priority = Literal["order", "largest_gate", "sum_of_gates", "random"]
"""Order in which tokens get slots (``vmoe/routing/priority.py``)."""
PRIORITIES: tuple[Priority, ...] = get_args(Priority)


@dataclasses.dataclass(frozen=True)
class AuxLossWeights(Checked):
    """Weights of the auxiliary losses of one MoE layer (``vmoe/routing/aux_losses.py``)."""

    section = "model.moe.router.aux_loss"

    importance: NonNegative = 0.005
    """Weight of the importance loss: the squared coefficient of variation of the experts' summed
    gates (V-MoE, appendix A)."""
    load: NonNegative = 0.005
    """Weight of the load loss: the same for the experts' smoothed loads; only in training with
    noise."""
    gshard: NonNegative = 0.0
    """Weight of GShard's loss: the product of first-choice shares and mean gates (arXiv
    2006.16668)."""
    z: NonNegative = 0.0
    """Weight of the z loss of ST-MoE: the mean squared log-partition of the router logits (arXiv
    2202.08906)."""


BALANCING = ("importance", "load", "gshard")
"""The auxiliary losses that balance the load of experts."""


class RouterConfig(Checked):
    """The interface of every router's config.

    A router overrides a value with a field if users choose it, otherwise with a class attribute or
    a property.

    Attributes:
        logits_per: the logits that the router reads: "expert" for logits (g, s, e); "slot" for (g,
            s, e, c), where slots are parameters of the gate and each is a mixture of all tokens of
            an image; None for a router that decides by a fixed rule, whose layer has no gate.
        can_drop: whether tokens choose their experts, so that a choice can be dropped.
        needs_positions: whether the router needs the position of each token in its image.
        stateful: whether the router has state that is not a parameter.
    """

    section = "model.moe.router"
    logits_per: str | None = "expert"
    can_drop = False
    needs_positions = False
    stateful = False

    @property
    def k(self) -> int | None:
        """Experts per token, if users choose it."""
        return None

    @property
    def priority(self) -> Priority | None:
        """Order in which tokens get slots, if users choose it."""
        return None

    @property
    def normalize_weights(self) -> bool:
        """Whether to divide a token's combine weights by their sum; False without that setting."""
        return False

    @property
    def normalized(self) -> bool:
        """Whether a token's combine weights sum to 1, before any choice is dropped."""
        return self.normalize_weights

    @property
    def learned(self) -> bool:
        """Whether the layer has a gate, which is trained."""
        return self.logits_per is not None

    @property
    def experts_per_token(self) -> int:
        """Choices of each token: the field k, or 1.

        A capacity factor counts slots per token and choice.
        """
        return self.k or 1

    @property
    def needs_draw(self) -> bool:
        """Whether the router needs a random number for each token in training."""
        return self.priority == "random"

    @property
    def noise_std(self) -> float:
        """The noise on the logits in training has standard deviation noise_std / e."""
        return 0.0

    @property
    def jitter(self) -> float:
        """The gate's tokens are multiplied in training by random numbers in 1 +- jitter."""
        return 0.0

    @property
    def aux_loss(self) -> AuxLossWeights:
        """Weights of the auxiliary losses."""
        return AuxLossWeights(importance=0.0, load=0.0)

    @property
    def weights_are_gates(self) -> bool:
        """Whether a token's combine weights are the gates of its experts, before normalization."""
        return True

    @property
    def balanced_by(self) -> str | None:
        """What balances the load in training, for advice to users; None if nothing does."""
        losses = [name for name in BALANCING if getattr(self.aux_loss, name)]
        if not losses:
            return None
        return f"weight of the {' and '.join(losses)} loss{'es' * (len(losses) > 1)}"


@dataclasses.dataclass(frozen=True)
class TokenChoice(RouterConfig):
    """Each token chooses its k experts: the router of V-MoE (arXiv 2106.05974).

    FastMoE's naive gate (arXiv 2103.13262) is this router with ``normalize_weights``, without noise
    and without losses, in a dropless layer.
    """

    kind: Literal["token_choice"] = "token_choice"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""
    priority: Priority = "order"
    """Order in which tokens get slots. order: by position in the group; largest_gate: by the
    largest gate (Batch Prioritized Routing); sum_of_gates: by the sum of the k gates; random: in
    random order, a baseline."""
    noise_std: NonNegative = 1.0
    """Noise on the logits in training: its standard deviation is noise_std / e, for e experts,
    unless the gate determines it."""
    normalize_weights: bool = False
    """Divide a token's combine weights by their sum, before any choice is dropped."""
    aux_loss: AuxLossWeights = AuxLossWeights()

    can_drop = True


@dataclasses.dataclass(frozen=True)
class ExpertChoice(RouterConfig):
    """Each expert chooses the tokens with its largest gates (Expert Choice, arXiv 2202.09368)."""

    kind: Literal["expert_choice"] = "expert_choice"
    """The router."""
    noise_std: NonNegative = 1.0
    """The noise on the logits in training has standard deviation noise_std / e, unless the gate
    determines it."""


@dataclasses.dataclass(frozen=True)
class Soft(RouterConfig):
    """Each slot is a mixture of all tokens of an image (Soft MoE, arXiv 2308.00951).

    An expert has round(s * capacity_factor / e) slots, at least one; ``capacity_multiple`` does not
    apply.
    """

    kind: Literal["soft"] = "soft"
    """The router."""

    logits_per = "slot"


@dataclasses.dataclass(frozen=True)
class Switch(RouterConfig):
    """Each token chooses one expert (Switch Transformer, arXiv 2101.03961)."""

    kind: Literal["switch"] = "switch"
    """The router."""
    jitter: Annotated[float, at_least(0), less_than(1)] = 0.01
    """In training the gate's tokens are multiplied by random numbers in 1 +- jitter."""
    aux_loss: AuxLossWeights = AuxLossWeights(importance=0.0, load=0.0, gshard=0.01)

    can_drop = True


@dataclasses.dataclass(frozen=True)
class GShard(RouterConfig):
    """Each token chooses two experts, the second one at random (GShard, arXiv 2006.16668)."""

    kind: Literal["gshard"] = "gshard"
    """The router."""
    aux_loss: AuxLossWeights = AuxLossWeights(importance=0.0, load=0.0, gshard=0.01)

    can_drop = True
    normalized = True

    @property
    def experts_per_token(self) -> int:
        return 2

    @property
    def needs_draw(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class BiasBalanced(RouterConfig):
    """Each token chooses its k experts; a bias balances their load (arXiv 2408.15664)."""

    kind: Literal["bias_balanced"] = "bias_balanced"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""
    scores: Literal["sigmoid", "softmax"] = "sigmoid"
    """The function from logits to scores."""
    update_rate: NonNegative = 0.001
    """Change of an expert's bias after each step of training."""
    priority: Priority = "order"
    """Order in which tokens get slots; see ``TokenChoice``. largest_gate: by the gate of the expert
    that is chosen first, with its bias."""
    normalize_weights: bool = False
    """Divide a token's combine weights by their sum, before any choice is dropped, as DeepSeek-V3
    does (arXiv 2412.19437)."""

    can_drop = True
    stateful = True

    @property
    def balanced_by(self) -> str:
        """See ``RouterConfig``."""
        return "update rate of the bias"

    @property
    def weights_are_gates(self) -> bool:
        """See ``RouterConfig``."""
        return self.scores == "softmax"


@dataclasses.dataclass(frozen=True)
class Random(RouterConfig):
    """Each token gets k random experts, without a gate: a baseline."""

    kind: Literal["random"] = "random"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""

    logits_per = None
    can_drop = True
    normalized = True
    needs_positions = True

    @property
    def needs_draw(self) -> bool:
        return True


@dataclasses.dataclass(frozen=True)
class Hash(RouterConfig):
    """Each position in the image has its k experts, without a gate (Hash layers, arXiv
    2106.04426)."""

    kind: Literal["hash"] = "hash"
    """The router."""
    k: Annotated[int, at_least(1)] = 2
    """Experts per token."""
    seed: Annotated[int, at_least(0), less_than(2**32)] = 0
    """Determines the experts of each position."""

    logits_per = None
    can_drop = True
    normalized = True
    needs_positions = True


Router = TokenChoice | ExpertChoice | Soft | Switch | GShard | BiasBalanced | Random | Hash
