"""The models: a standard one, others that differ in one factor, and some of other sizes."""

import dataclasses
from collections.abc import Collection
from typing import Any

from scripts.experiments.claims.measure import CHANGES
from scripts.experiments.framework.runs import ROOT, in_steps
from vmoe.config import (
    BiasBalanced,
    CosineGate,
    ExpertChoice,
    Hash,
    Soft,
    TokenChoice,
    TrainConfig,
    load,
    replace,
)
from vmoe.costs.flops import cost
from vmoe.models import block_numbers, model_config
from vmoe.routing.aux_losses import NO_LOSSES

RECIPE = ROOT / "configs" / "fashion_mnist.py"
STEPS = 4_000
BATCH_SIZE = 64
ROUTED = {"capacity_factor": 2.0}  # rows of the experts: as many as two choices per token
HALF = {"capacity_factor": 0.5}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A trained model.

    Attributes:
        label: what differs from the standard model.
        model: changed fields of the model's config.
        dense: without experts.
        equal_flops: trained for as many FLOPs as the standard model, in more steps.
        length: its steps, relative to the standard model's.
        expert_averaging: see ``OptimConfig``.
        seeds: the number of seeds.
        changes: what is measured beside the model as trained, if the model allows it (measure.py).
    """

    label: str
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    dense: bool = False
    equal_flops: bool = False
    length: float = 1.0
    expert_averaging: float = 0.0
    seeds: int = 12
    changes: Collection[str] = ("attacks", "batch", "merged")


def _moe(**fields: Any) -> dict[str, Any]:
    return {"moe": fields}


VARIANTS = {
    "standard": Variant("V-MoE: 8 experts in blocks 1, 3, 5, k = 2", changes=CHANGES),
    "dense": Variant("dense, equal steps", dense=True),
    "dense_flops": Variant("dense, equal training FLOPs", dense=True, equal_flops=True),
    "last2": Variant("experts in blocks 3, 5", {"sparse_blocks": block_numbers("last2", 6)}),
    "all_blocks": Variant(
        "experts in all blocks", {"sparse_blocks": tuple(range(6))}, seeds=3, changes=CHANGES
    ),
    "e4": Variant("4 experts", _moe(num_experts=4)),
    "e16": Variant("16 experts", _moe(num_experts=16)),
    "k1": Variant("k = 1", _moe(router=TokenChoice(k=1))),
    "expert_choice": Variant("expert choice", _moe(router=ExpertChoice(**ROUTED))),
    "soft": Variant("soft", _moe(router=Soft(**ROUTED))),
    "bias_balanced": Variant(
        "bias-balanced: sigmoid scores, no noise", _moe(router=BiasBalanced())
    ),
    "bias_softmax": Variant(
        "bias-balanced: softmax scores, no noise", _moe(router=BiasBalanced(scores="softmax"))
    ),
    "unbalanced": Variant(
        "token choice without losses and noise",
        _moe(router=TokenChoice(noise_std=0.0, aux_loss=NO_LOSSES)),
    ),
    "cosine": Variant("cosine gate", _moe(gate=CosineGate())),
    "hash": Variant("hash of the position", _moe(router=Hash())),
    "shared": Variant("k = 1 and a shared expert", _moe(router=TokenChoice(k=1), shared_experts=1)),
    "half": Variant("trained at capacity factor 0.5, in order", _moe(router=HALF), changes=CHANGES),
    "half_bpr": Variant(
        "trained at capacity factor 0.5, largest gate first",
        _moe(router=TokenChoice(priority="largest_gate", **HALF)),
        changes=CHANGES,
    ),
    "averaged": Variant("experts averaged by 0.1 after every step", expert_averaging=0.1, seeds=3),
    "class_token": Variant(
        "class token instead of the mean", {"pooling": "class_token"}, seeds=3, changes=CHANGES
    ),
}
SCALED = {
    f"{kind}_{width}_{round(length * STEPS)}": Variant(
        f"{kind}, width {width}",
        {"width": width, "mlp_dim": 2 * width},
        dense=kind == "dense",
        length=length,
        seeds=6,
        changes=(),
    )
    for kind in ("sparse", "dense")
    for width in (40, 64, 104)  # 0.4, 1 and 2.5 times the FLOPs of an image
    for length in (0.5, 1.0)
    if (width, length) != (64, 1.0)  # "standard" and "dense"
}
"""The models of accuracy against training FLOPs, beside "standard" and "dense"."""
MODELS = VARIANTS | SCALED
LATER = {"bias_balanced", "bias_softmax", "shared", "hash", "cosine"}
GROUPS = (VARIANTS.keys() - LATER, LATER, SCALED)
"""The models in the order of their training."""


def train_config(name: str, steps: int = STEPS, data: str | None = None) -> TrainConfig:
    """The config of a variant.

    Args:
        steps: steps of the standard model.
        data: the name of the data; by default the config's.
    """
    variant, recipe = MODELS[name], load(RECIPE)
    standard = recipe.model
    model = replace(model_config("vit_fashion_mnist") if variant.dense else standard)
    steps = round(steps * variant.length)
    if variant.equal_flops:
        steps = round(steps * cost(standard).flops_per_image / cost(model).flops_per_image)
    return replace(
        in_steps(recipe, steps),
        data={"name": data or recipe.data.name},
        model=replace(model, **variant.model),
        batch_size=BATCH_SIZE,
        optim={"expert_averaging": variant.expert_averaging},
        evaluate_every=steps,
    )
