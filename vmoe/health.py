"""Finds problems in the routing of a model; each finding has a threshold and a remedy.

A perfectly balanced router is not a finding.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from vmoe.config import MoEConfig, ViTConfig, ZeroExpert
from vmoe.errors import listed, one_of
from vmoe.routing import (
    AnyRouter,
    BiasBalanced,
    ExpertChoice,
    ReLU,
    Sinkhorn,
    Switch,
    TokenChoice,
    Transport,
    TransportExpertChoice,
)
from vmoe.routing.aux_losses import BALANCING
from vmoe.routing.load import ExpertTotals

MIN_LOAD = 0.01
"""Smallest load of an expert that is in use, as a fraction of the mean."""
MAX_LOAD = 5.0
"""Largest load of an expert, as a multiple of the mean."""
MAX_SHARE = 0.75
"""Largest fraction of the tokens that may choose one expert. If a uniform share is more than half
of the tokens, the limit is halfway between the uniform share and all tokens."""
MAX_DROPPED = 0.25
"""Largest fraction of the choices without a slot."""
MIN_ENTROPY = 0.01
"""Smallest mean entropy of the gates, as a fraction of ln e; below it, the router hardly learns."""
MAX_CHANGED = 0.01
"""Largest fraction of the predictions that may depend on the other images of a batch."""

BALANCED_BY: dict[type[AnyRouter], str] = {
    BiasBalanced: "update rate of the bias",
    ReLU: "factor of the L1 loss",
    Sinkhorn: "number of Sinkhorn iterations",
    Transport: "number of steps",
}
"""What balances the load in training, of routers that have more for it than auxiliary losses."""
JOINT = Transport, TransportExpertChoice
"""Routers with which tokens of a group depend on each other even if every choice gets a slot."""


def weights_are_gates(router: AnyRouter) -> bool:
    """Whether a token's combine weights are the gates of its experts, before normalization.

    False for routers that are not known here.
    """
    match router:
        case BiasBalanced():
            return router.scores == "softmax"
        case Sinkhorn():
            return router.k > 1
    return isinstance(router, TokenChoice | Switch | ExpertChoice | TransportExpertChoice)


class Finding(NamedTuple):
    """A problem in the routing of a model.

    Attributes:
        kind: "dead", "collapse", "dropped", "low_entropy", "not_finite" or "batch".
        block: number of the sparse block; None if it concerns the whole model.
        value: the measured value; None if it is not finite.
        threshold: the bound that the value violates.
        message: an explanation, and a remedy.
    """

    kind: str
    block: int | None
    value: float | None
    threshold: float
    message: str

    def __str__(self) -> str:
        place = "" if self.block is None else f"block {self.block}: "
        return f"{self.kind}: {place}{self.message}"


def findings(
    config: ViTConfig,
    blocks: Mapping[int, ExpertTotals],
    changed: float | None = None,
    *,
    training: bool = False,
) -> list[Finding]:
    """The problems in a model's routing on a data set; empty if there are none.

    Args:
        config: the config of the model.
        blocks: the totals of each sparse block, such as its statistics.
        changed: the fraction of the predictions that depend on the batch, if it was measured.
        training: whether the model is still trained; then no message advises to prune experts,
            which may come into use.

    An expert without parameters, such as a zero expert, is never dead: tokens may avoid it.
    """
    layers = config.moe_blocks
    # ``vmoe prune`` prunes all layers of a model, or none.
    prune = not training and all(moe.can_be_pruned for moe in layers.values())
    every = [
        finding
        for i, block in blocks.items()
        for finding in _of_block(i, block, layers[i], can_prune=prune)
    ]
    if changed is not None and changed > MAX_CHANGED:
        routers = [moe.router for moe in layers.values()]
        alone = not any(isinstance(router, JOINT) for router in routers)
        slots = all(router.logits_per != "slot" for router in routers)
        ways = ["more capacity"] * (alone and slots)
        ways += ["dropless"] * (alone and all(router.can_drop for router in routers))
        message = (
            f"{changed:.1%} of the predictions depend on the other images of the batch "
            f"(at most {MAX_CHANGED:.0%}): evaluate with {one_of([*ways, 'one image per group'])}"
        )
        every.append(Finding("batch", None, changed, MAX_CHANGED, message))
    return every


def all_clear(
    config: ViTConfig,
    blocks: Mapping[int, ExpertTotals],
    changed: float | None = None,
) -> str:
    """One line for routing without findings: what was checked, with the bounds.

    It takes the same arguments as ``findings``.
    """
    checks, learned = [], config.learned
    if learned:
        checks += [
            f"no dead expert (below {MIN_LOAD:.0%} of the mean load)"
            if all(map(_enough_choices, blocks.values()))
            else "too few choices to find dead experts",
            f"no collapse (an expert above {MAX_LOAD:g} times the mean load)",
        ]
    if config.can_drop:
        checks.append(f"at most {MAX_DROPPED:.0%} of the choices dropped")
    if learned:
        checks.append(f"gate entropy at least {MIN_ENTROPY:.0%} of ln e")
    if changed is not None:
        checks.append(f"at most {MAX_CHANGED:.0%} of the predictions depend on the batch")
    return f"no problem found: {', '.join(checks)}"


def about_unprocessed(moe: MoEConfig) -> list[str]:
    """What a reader of the share of unprocessed tokens must know about the experts of a layer."""
    zero = [str(i) for i, each in enumerate(moe.each_expert) if isinstance(each, ZeroExpert)]
    return [
        *["shared experts process every token"] * bool(moe.shared_experts),
        *[f"tokens with a slot at a zero expert ({listed(zero, 8)}) count as processed"]
        * bool(zero),
    ]


def _enough_choices(block: ExpertTotals) -> bool:
    """Whether an expert without choices is dead; with few choices it may be chance."""
    return not block.choices.any() or block.choices.sum() * MIN_LOAD >= len(block.gates)


def _balance(router: AnyRouter) -> str:
    """Advice for a load that is not even."""
    losses = [name for name in BALANCING if getattr(router.aux_loss, name)]
    balanced_by = BALANCED_BY.get(type(router))
    if losses and balanced_by is None:
        balanced_by = f"weight of the {' and '.join(losses)} loss{'es' * (len(losses) > 1)}"
    return (
        f"train with a larger {balanced_by}" if balanced_by else "train with a lower learning rate"
    )


def _of_block(i: int, block: ExpertTotals, moe: MoEConfig, *, can_prune: bool) -> Iterator[Finding]:
    if not np.isfinite(block.gates).all():
        message = "gates are NaN or infinite: load an earlier checkpoint"
        yield Finding("not_finite", i, None, 0.0, message)
        return
    router, e, chosen = moe.router, len(block.gates), bool(block.choices.any())
    load, of = block.load * e, "choices" if chosen else "gates"
    balance = _balance(router)
    learn = np.array([expert.learns for expert in moe.each_expert])  # others cannot be dead
    if (
        router.learned
        and _enough_choices(block)
        and (rare := np.flatnonzero((load < MIN_LOAD) & learn).tolist())
    ):
        prune = ", or prune them" * (chosen and can_prune)
        message = (
            f"{len(rare)} of {e} experts ({listed(list(map(str, rare)), 8)}) get less than "
            f"{MIN_LOAD:.0%} of the mean load of {of}: {balance}{prune}"
        )
        yield Finding("dead", i, float(load[rare].min()), MIN_LOAD, message)
    even = block.choices.sum() / block.tokens / e if chosen else 1 / e  # share of tokens or gates
    limit = min(MAX_LOAD, max(MAX_SHARE, (1 + even) / 2) / even)
    if router.learned and e > 1 and load.max() > limit:
        share = f", from {even * load.max():.0%} of the tokens" * chosen
        message = (
            f"expert {load.argmax()} gets {load.max():.1f} times the mean load of {of} (at most "
            f"{limit:.2g}){share}: {balance}"
        )
        yield Finding("collapse", i, float(load.max()), limit, message)
    if block.dropped > MAX_DROPPED:
        ignores_gates = router.has("priority") and router.priority in ("order", "random")
        larger = f"capacity{' factor' * (router.capacity is None)}"
        if ignores_gates:
            larger += ", or priority largest_gate, which drops the least important tokens"
        message = (
            f"{block.dropped:.0%} of the choices get no slot (at most {MAX_DROPPED:.0%}): use a "
            f"larger {larger}"
        )
        yield Finding("dropped", i, block.dropped, MAX_DROPPED, message)
    if router.learned and block.relative_entropy < MIN_ENTROPY:
        message = (
            f"the gates' entropy is {block.relative_entropy:.1%} of ln e (at least "
            f"{MIN_ENTROPY:.0%}), so the router hardly learns: train with a lower learning rate"
            f"{' or with the z loss' * ('aux_loss' in vars(router))}"
        )
        yield Finding("low_entropy", i, block.relative_entropy, MIN_ENTROPY, message)
