"""Stored runs of the V-MoE authors' code as models of vmoe: settings, arrays by published name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.routers import grouped
from vmoe.checkpoints import flax_names
from vmoe.checkpoints.arrays import ArrayFile, ArrayInfo
from vmoe.checkpoints.assemble import assemble
from vmoe.checkpoints.family import Family
from vmoe.checkpoints.stored import Origin
from vmoe.config import (
    AnyRouter,
    ExpertChoice,
    MlpExpert,
    MoEConfig,
    Soft,
    TokenChoice,
    ViTConfig,
)
from vmoe.config.preprocessing import Preprocessing


def published_params(config: ViTConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters, by the reader of published checkpoints."""
    infos = {name: ArrayInfo(array.shape, array.dtype) for name, array in arrays.items()}
    file = ArrayFile(Path("stored"), infos, lambda names: ((name, arrays[name]) for name in names))
    return assemble(published_family(file, config=config)).params


def published_family(file: ArrayFile, **fields: Any) -> Family:
    """The family of published checkpoints, whose arrays are in the memory."""
    origin = Origin("published", file.path)
    return Family(origin, file, flax_names.rename, lambda n: (Preprocessing(n), []), **fields)


def published_router(theirs: dict[str, Any]) -> AnyRouter:
    slots = theirs.get("dispatcher", theirs)
    factor, capacity = slots["capacity_factor"] or 1.0, slots.get("num_slots")
    match theirs.get("name", "").split(".")[-1]:
        case "SoftRouter":
            return Soft(capacity_factor=factor, capacity=capacity)
        case "NoisyTopItemsPerExpertRouter":
            return ExpertChoice(
                noise_std=theirs["noise_std"], capacity_factor=factor, capacity=capacity
            )
    return TokenChoice(
        capacity_factor=factor,
        capacity=capacity,
        k=theirs["num_selected_experts"],
        priority="largest_gate" if theirs["dispatcher"]["batch_priority"] else "order",
        noise_std=theirs["noise_std"],
    )


def published_config(theirs: dict[str, Any], image_size: int) -> ViTConfig:
    encoder, moe = theirs["encoder"], theirs["encoder"]["moe"]
    patch_size = theirs["patch_size"][0]
    tokens = (image_size // patch_size) ** 2 + (theirs["classifier"] == "token")
    return ViTConfig(
        patch_size=patch_size,
        width=theirs["hidden_size"],
        depth=encoder["num_layers"],
        mlp_dim=encoder["mlp_dim"],
        num_heads=encoder["num_heads"],
        image_size=image_size,
        num_classes=theirs["num_classes"],
        pooling={"token": "class_token", "gap": "mean", "map": "attention"}[theirs["classifier"]],
        positions=encoder.get("position_emb", {"name": "learned"})["name"],
        pre_logits=theirs["representation_size"],
        head_bias=theirs["head_bias_init"],
        qk_norm=encoder.get("attention_qk_norm", False),
        sparse_blocks=tuple(moe["layers"]),
        moe=MoEConfig(
            num_experts=moe["num_experts"],
            router=grouped(published_router(moe["router"]), moe["group_size"] // tokens),
            experts=MlpExpert(shared_init=not moe["split_rngs"]),
        ),
    )
