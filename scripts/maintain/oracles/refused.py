"""Models that are no ViTs but have similar files: readers must raise an error with the reason."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
from timm.models import save_for_hf
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    Dinov2Config,
    Dinov2ForImageClassification,
    PretrainedConfig,
    PreTrainedModel,
)

from scripts.maintain.oracles.libraries import randomize
from scripts.maintain.oracles.npz import npz_model, original
from scripts.maintain.oracles.parameters import Arrays

HF_SIZES = dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8)


class Refused(NamedTuple):
    reason: str
    write: Callable[[str], None]


def of_timm(architecture: str, **changes: object) -> Callable[[str], None]:
    def write(folder: str) -> None:
        module = timm.create_model(architecture, num_classes=2, **changes)
        randomize(module, seed=0)
        save_for_hf(module, folder, safe_serialization=True)

    return write


def of_hf(
    model: type[PreTrainedModel], config: type[PretrainedConfig], **changes: object
) -> Callable[[str], None]:
    def write(folder: str) -> None:
        module = model(config(**HF_SIZES, patch_size=4, num_labels=2, **changes))
        randomize(module, seed=0)
        module.save_pretrained(folder)

    return write


def hybrid(folder: str) -> None:
    """A ResNet before the transformer; real files also have its later stages, left out here."""
    values = original(npz_model(0, "token", "with_class", original).parameters)
    keep: Arrays = {k: v for k, v in values.items() if "encoderblock_1" not in k and "Mlp" not in k}
    keep["conv_root/kernel"] = np.ones((7, 7, 3, 2), np.float32)
    keep |= {f"gn_root/{part}": np.ones((1, 1, 1, 2), np.float32) for part in ("scale", "bias")}
    Path(folder).mkdir(parents=True)
    np.savez(Path(folder) / "model.npz", **keep)


TIMM_SIZES = dict(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, mlp_ratio=2)
DINOV2_SIZES = dict(mlp_ratio=2)
REFUSED = {
    "timm_distilled": Refused(
        "dist_token and head_dist: two heads, averaged",
        of_timm("deit_tiny_distilled_patch16_224", **TIMM_SIZES),
    ),
    "timm_qk_norm": Refused(
        "q_norm, k_norm: a LayerNorm with bias of queries and keys",
        of_timm("vit_small_patch16_224", **TIMM_SIZES, qk_norm=True),
    ),
    "timm_swin": Refused(
        "windows, relative positions, four stages",
        of_timm(
            "swin_tiny_patch4_window7_224",
            **dict(img_size=32, embed_dim=8, depths=(1, 1), num_heads=(1, 2), window_size=4),
        ),
    ),
    "hf_deit": Refused(
        "embeddings.distillation_token: a second prefix token",
        of_hf(DeiTForImageClassification, DeiTConfig, intermediate_size=16),
    ),
    "hf_dinov2_classifier": Refused(
        "the classifier reads the class token and the mean of the patches",
        of_hf(Dinov2ForImageClassification, Dinov2Config, **DINOV2_SIZES),
    ),
    "npz_hybrid": Refused("conv_root, gn_root: a ResNet before the transformer", hybrid),
}
