"""The axis letters, and the inputs, decisions and records of routing.

Every public annotation spells its axes with these letters:

    b images          h w pixels        i j the patch grid   n tokens of an image
    g groups          s tokens of a group                    k experts per token
    e experts         c slots of an expert in a group (its capacity)
    d width           f hidden width of an expert            p side of a patch
    a heads           z width of a head                      y classes
    q queries         r features before the classes          x any other

In a layer outside of a model, images are any sequences of tokens. Channels are a literal 3. A
*slot* holds one token at an expert; each expert has ``c`` per group. A *choice* is a pair (token,
rank): the token's rank-th expert. Choices of a group are numbered ``token * k + rank`` and slots
``expert * c + position``, so one integer identifies either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int, Shaped

Images = Float[Array, "b h w 3"] | Float[np.ndarray, "b h w 3"]  # pixels in [-1, 1]
Valid = Bool[Array, "b"] | Bool[np.ndarray, "b"]  # False for images that only fill the batch


class RouterInputs(NamedTuple):
    """Inputs of a router, which routes each group independently.

    Attributes:
        logits: the gate's output, float32, before noise; with slots as a last axis if the gate
            makes logits per slot. Zeros for a router that reads no logits.
        noise: noise to add to the logits; None in evaluation.
        valid: False for padding, which takes no slot and counts in no loss.
        draw: a random number in [0, 1) per token; None in evaluation.
        noise_std: the standard deviation of the noise, if the gate determines it; None if it is
            the router's ``noise_std`` / e.
        positions: the position of each token in its image, in [0, n).
        state: the router's state, by name, if it has one; each array has an axis g in front.
        per_token: the inputs per token that the router ``takes``, by name.
    """

    logits: Float[Array, "g s e *c"]
    noise: Float[Array, "g s e *c"] | None
    valid: Bool[Array, "g s"]
    draw: Float[Array, "g s"] | None
    noise_std: Float[Array, "g s e"] | None = None
    positions: Int[Array, "g s"] | None = None
    state: dict[str, Float[Array, "g ..."]] | None = None
    per_token: dict[str, Shaped[Array, "g s ..."]] | None = None

    @property
    def training(self) -> bool:
        """Whether this is a step of training, also for a router without noise."""
        return self.draw is not None

    @property
    def noisy_logits(self) -> Float[Array, "g s e *c"]:
        """The logits plus the noise; the logits alone in evaluation."""
        return self.logits if self.noise is None else self.logits + self.noise


class Routing(NamedTuple):
    """Routing decisions as index arrays, for token-choice and expert-choice routers.

    ``slots`` and ``choices`` are inverses of each other, so that with token choice dispatch,
    combine and their gradients are all gathers. With expert choice a token may have any number of
    experts: k is then e, and rank r is expert r.

    Attributes:
        experts: the expert of each choice, in [0, e); e where there is no choice (padding, or an
            expert that did not choose the token).
        slots: the slot that each choice got, in [0, e * c); e * c where it got none.
        choices: the choice that fills each slot, in [0, s * k); s * k where the slot is empty.
        weights: the combine weight of each choice, 0 or more; 0 if the choice got no slot.
    """

    experts: Int[Array, "g s k"]
    slots: Int[Array, "g s k"]
    choices: Int[Array, "g e c"]
    weights: Float[Array, "g s k"]

    @property
    def kept(self) -> Bool[Array, "g s k"]:
        """Whether a choice got a slot."""
        _, e, c = self.choices.shape
        return self.slots < e * c

    @property
    def dropped(self) -> Bool[Array, "g s k"]:
        """Whether a choice exists but got no slot; always False with expert choice."""
        return (self.experts < self.choices.shape[1]) & ~self.kept

    @property
    def filled(self) -> Bool[Array, "g e c"]:
        """Whether a slot has a choice."""
        _, s, k = self.slots.shape
        return self.choices < s * k

    @property
    def tokens(self) -> Int[Array, "g e c"]:
        """The token that fills each slot, in [0, s); s where the slot is empty."""
        return self.choices // self.slots.shape[-1]


class SoftRouting(NamedTuple):
    """Routing decisions as dense weights: every slot is a mixture of all tokens of its group.

    Attributes:
        dispatch: the weight of each token in each slot; sums to 1 over s.
        combine: the weight of each slot in each token's output; sums to 1 over e and c.
    """

    dispatch: Float[Array, "g s e c"]
    combine: Float[Array, "g s e c"]


class Decision(NamedTuple):
    """Output of a router, which routes each group independently.

    Attributes:
        gates: the weight of each expert for each token, in [0, 1]: the softmax that the routing
            used (in training, the softmax of the noisy logits); for soft routing, the combine
            weights summed over an expert's slots.
        routing: which token goes to which slot, with which weight.
        losses: auxiliary losses by name; unweighted, one value per group.
        sums: arrays by name that the layer adds up over groups and devices, for the next state of
            the router and for its losses over more than a group.
    """

    gates: Float[Array, "g s e"]
    routing: Routing | SoftRouting
    losses: dict[str, Float[Array, "g"]] = {}
    sums: dict[str, Shaped[Array, "g ..."]] = {}


Route = Callable[[RouterInputs, Any, int], Decision]
"""A function that decides instead of a router: (inputs, that router, number of slots c)."""


class Record(NamedTuple):
    """Routing of one sparse block in one forward pass.

    Attributes:
        logits: the gate's output, before noise; see ``RouterInputs``.
        gates: see ``Decision``.
        routing: see ``Decision``.
        losses: see ``Decision``; a loss over more tokens has the same value for all their groups.
        sums: see ``Decision``.
        aux_loss: the weighted sum of the losses, averaged over the groups.
        valid: False for padding, which takes no slot and counts in no loss.
    """

    logits: Float[Array, "g s e *c"]
    gates: Float[Array, "g s e"]
    routing: Routing | SoftRouting
    losses: dict[str, Float[Array, "g"]]
    sums: dict[str, Shaped[Array, "g ..."]]
    aux_loss: Float[Array, ""]
    valid: Bool[Array, "g s"]
