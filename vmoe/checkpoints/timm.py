"""ViTs of timm: a folder with ``model.safetensors`` and ``config.json``.

config.json names the architecture, and the fields that differ from it. The number of heads, the
GELU and the epsilon of an architecture are in no file (timm 1.0.31, models/vision_transformer.py
and deit.py).
"""

import math
import re
from collections.abc import Mapping
from typing import Any, cast, get_args

from vmoe.checkpoints.arrays import ArrayFile
from vmoe.checkpoints.assemble import Recipe, checked_pixels
from vmoe.checkpoints.torch_names import TIMM, renaming
from vmoe.config.preprocessing import Interpolation, Preprocessing
from vmoe.errors import UsageError

HEADS = {  # a size in the name of an architecture -> attention heads
    **{"tiny": 3, "xsmall": 4, "wee": 4, "pwee": 4, "little": 5, "small": 6, "medium": 8},
    **{"mediumd": 8, "betwixt": 10, "base": 12, "large": 16, "intern300m": 16, "huge": 16},
    **{"giant": 16, "gigantic": 16, "giantopt": 16, "so400m": 16, "so150m": 14, "so150m2": 13},
}
MAX_NAME = 100  # characters; the patterns below take long for longer names
FAMILIES = "vit|deit|deit3|flexivit|eva"
TANH = (  # architectures whose GELU is not by erf
    r"vit_(so400m|giantopt)_patch\d+_siglip_.*",
    r"vit_base_patch32_siglip_.*",
    r"vit_large_patch16_siglip_(gap_)?512",
)
QUICK = r"vit_.*_clip_quickgelu_.*"
CLIP = r"vit_.*_clip_.*"  # their layer norms have epsilon 1e-5


def recipe(file: ArrayFile, config: Mapping[str, Any]) -> Recipe:
    """How to read a ViT of timm.

    Args:
        config: the content of config.json.

    Raises:
        UsageError: the architecture is unknown, or no plain ViT.
    """
    architecture, changes = str(config["architecture"]), config.get("model_args") or {}
    heads = _heads(file, architecture, changes.get("num_heads"))
    given: dict[str, Any] = {
        "gelu": _gelu(architecture),
        "norm_epsilon": 1e-5 if re.fullmatch(CLIP, architecture) else 1e-6,
        "fc_norm": "fc_norm.weight" in file.infos,
    }
    pretrained = config.get("pretrained_cfg") or {}
    pooling = changes.get("global_pool", config.get("global_pool", pretrained.get("global_pool")))
    if pooling == "avg" and "cls_token" in file.infos:
        given["pooling"] = "patch_mean"
    elif pooling not in ("token", "avg", "map", "", None):
        raise UsageError(f"{file.path}: global_pool {pooling!r} cannot be represented")
    mean, std = (pretrained.get(name, [0.5] * 3) for name in ("mean", "std"))
    return Recipe(file, renaming(TIMM, heads), given, pixels=checked_pixels(mean, std))


def _heads(file: ArrayFile, architecture: str, given: Any) -> int:
    found = re.match(rf"(?:{FAMILIES})_(?:([a-z0-9]+)_)?", architecture)
    if found is None or len(architecture) > MAX_NAME:
        raise UsageError(f"{file.path}: architecture {architecture!r} is no ViT of timm's families")
    if type(given) is int:
        return given
    if found[1] not in HEADS:
        raise UsageError(
            f"{file.path}: architecture {architecture!r} is unknown, and so its number of heads; "
            "add model_args.num_heads to config.json"
        )
    if "_plus_" in architecture:
        return 14
    if "base_patch16_gap" in architecture:
        return 16
    return 24 if found[1] == "giant" and "patch14_dinov2" in architecture else HEADS[found[1]]


def _gelu(architecture: str) -> str:
    if re.fullmatch(QUICK, architecture):
        return "quick"
    return "tanh" if any(re.fullmatch(each, architecture) for each in TANH) else "erf"


def preprocessing(config: Mapping[str, Any], image_size: int) -> Preprocessing:
    """How timm prepares images for evaluation (timm 1.0.31, data/transforms_factory.py)."""
    pretrained = config.get("pretrained_cfg") or {}
    interpolation = str(pretrained.get("interpolation", "bicubic"))
    mode = str(pretrained.get("crop_mode") or "center")
    if interpolation not in get_args(Interpolation) or mode not in ("center", "squash"):
        raise UsageError(
            f"config.json: interpolation {interpolation!r} with crop_mode {mode!r} is not supported"
        )
    return Preprocessing(
        image_size,
        resize_to=math.floor(image_size / float(pretrained.get("crop_pct") or 0.875)),
        keep_aspect=mode == "center",
        interpolation=cast(Interpolation, interpolation),
    )


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes, if config.json has them."""
    names = config.get("label_names")
    return tuple(map(str, names)) if isinstance(names, list) else ()
