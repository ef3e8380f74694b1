"""ViTs of timm: a folder with ``model.safetensors`` and ``config.json``.

config.json has the name of the architecture, and the fields that differ from it. The number of
heads, the GELU and the epsilon of an architecture are in no file; this module has them (timm
1.0.31, models/vision_transformer.py and deit.py).
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any, cast, get_args

from vmoe.checkpoints.arrays import ArrayFile
from vmoe.checkpoints.family import (
    Family,
    check_known,
    checked_pixels,
    corrupt_if_wrong,
    side_of,
)
from vmoe.checkpoints.stored import Origin
from vmoe.checkpoints.torch_layouts import (
    PARAM,
    QKV_BIASES,
    Layout,
    half,
    inputs,
    linear,
    norm,
    output,
    patches,
    renaming,
    same,
)
from vmoe.config import CenteredRotary, GridRotary
from vmoe.config.experts import Activation
from vmoe.config.preprocessing import Interpolation, Preprocessing
from vmoe.errors import UsageError

HEADS = {  # a size in the name of an architecture -> attention heads
    **{"tiny": 3, "xsmall": 4, "wee": 4, "pwee": 4, "little": 5, "small": 6, "medium": 8, "7b": 32},
    **{"mediumd": 8, "betwixt": 10, "base": 12, "large": 16, "intern300m": 16, "huge": 16},
    **{"giant": 16, "gigantic": 16, "giantopt": 16, "so400m": 16, "so150m": 14, "so150m2": 13},
}
MAX_NAME = 100  # characters; the patterns below take long for longer names
FAMILIES = "vit|deit|deit3|flexivit|eva|eva02"
PLAIN = (  # words after the size in the names of architectures that are plain ViTs
    r"patch\d+|\d+|clip|quickgelu|siglip|gap|plus|dinov2|dinov3|qkvb|miil|distilled|reg\d+"
)
NORMS = {"layernorm": "layer", "rmsnorm": "rms"}
SHOWN = {  # model_args that the names and shapes of parameters show, or that training alone uses
    *("img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio"),
    *("qkv_fused", "swiglu_mlp", "swiglu_align_to", "scale_mlp", "scale_attn_inner", "use_fc_norm"),
    *("qk_norm", "init_values", "class_token", "no_embed_class", "fc_norm"),
    *(
        "pre_norm",
        "drop_rate",
        "pos_drop_rate",
        "patch_drop_rate",
        "proj_drop_rate",
        "attn_drop_rate",
    ),
    *("drop_path_rate", "weight_init", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"),
}
READ = {  # model_args that are read below
    "num_heads",
    "reg_tokens",
    "num_reg_tokens",
    "global_pool",
    "act_layer",
    "norm_layer",
    "qkv_bias",
}
TANH = (  # architectures with the tanh GELU
    r"vit_(so400m|giantopt)_patch16_siglip_.*",
    r"vit_base_patch32_siglip_.*",
    r"vit_large_patch16_siglip_(gap_)?512",
)
QUICK = r"vit_.*_clip_quickgelu_.*"
LEAST_CROP = 0.1  # smallest crop, as a share of the side of a resized image
NO_QKV_BIAS = r"vit_(base_patch16_224_miil|(medium|betwixt)_patch16_gap_\d+|so150m2_.*)"
LARGER_EPSILON = r"vit_.*_(clip|dinov3)(_.*)?"  # their layer norms have epsilon 1e-5
OF_EVA = r"eva02_.*|eva_giant_.*|vit_.*_dinov3(_.*)?"  # of timm's models/eva.py
PATCH_BIAS = "patches/embed/bias"

BLOCK = r"blocks\.(\d+)"
PARAMETERS: dict[str, Layout] = {
    rf"patch_embed\.proj\.{PARAM}": patches("patches/embed"),
    r"cls_token": same("class_token"),
    r"reg_token": same("registers"),
    r"pos_embed": same("positions/embedding"),
    rf"norm_pre\.{PARAM}": norm("pre_norm"),
    rf"{BLOCK}\.norm([12])\.{PARAM}": norm(r"blocks/\1/norm\2"),
    rf"{BLOCK}\.attn\.qkv\.{PARAM}": inputs(r"blocks/\1/attention", "query", "key", "value"),
    **{
        rf"{BLOCK}\.attn\.{name[0]}_{param}": inputs(r"blocks/\1/attention", name)
        for name in ("query", "key", "value")
        for param in (rf"proj\.{PARAM}", "(bias)")
    },
    rf"{BLOCK}\.attn\.norm\.{PARAM}": norm(r"blocks/\1/attention/norm"),
    rf"{BLOCK}\.attn\.proj\.{PARAM}": output(r"blocks/\1/attention"),
    rf"{BLOCK}\.(?:ls1\.gamma|gamma_1)": same(r"blocks/\1/attention/out/scale"),
    rf"{BLOCK}\.mlp\.fc1\.{PARAM}": linear(r"blocks/\1/mlp/up"),
    rf"{BLOCK}\.mlp\.fc2\.{PARAM}": linear(r"blocks/\1/mlp/down"),
    rf"{BLOCK}\.mlp\.fc1_g\.{PARAM}": half(r"blocks/\1/mlp/up", 0),
    rf"{BLOCK}\.mlp\.fc1_x\.{PARAM}": half(r"blocks/\1/mlp/up", 1),
    rf"{BLOCK}\.mlp\.norm\.{PARAM}": norm(r"blocks/\1/mlp/norm"),
    rf"{BLOCK}\.(?:ls2\.gamma|gamma_2)": same(r"blocks/\1/mlp/down/scale"),
    rf"(?:fc_)?norm\.{PARAM}": norm("norm"),
    r"attn_pool\.latent": same("attention_pool/probe"),
    rf"attn_pool\.q\.{PARAM}": inputs("attention_pool/attention", "query"),
    rf"attn_pool\.kv\.{PARAM}": inputs("attention_pool/attention", "key", "value"),
    rf"attn_pool\.proj\.{PARAM}": output("attention_pool/attention"),
    rf"attn_pool\.norm\.{PARAM}": norm("attention_pool/norm"),
    rf"attn_pool\.mlp\.fc1\.{PARAM}": linear("attention_pool/mlp/up"),
    rf"attn_pool\.mlp\.fc2\.{PARAM}": linear("attention_pool/mlp/down"),
    rf"head\.{PARAM}": linear("head/classes"),
}


def family(file: ArrayFile, config: Mapping[str, Any]) -> Family:
    """A ViT of timm, with the content of its config.json."""
    architecture, changes = str(config["architecture"]), config.get("model_args") or {}
    heads = _heads(file, architecture, changes.get("num_heads"))
    if unknown := sorted(changes.keys() - SHOWN - READ):
        raise UsageError(
            f"{file.path}: model_args.{unknown[0]}={changes[unknown[0]]!r:.40} is not supported"
        )
    pretrained = config.get("pretrained_cfg") or {}
    rotary = _rotary(architecture)
    size = side_of(changes.get("img_size", pretrained.get("input_size", [None])[-1]))
    if "pos_embed" not in file.infos and rotary.get("positions") != "none":
        raise UsageError(f"{file.path}: it has no pos_embed, so its positions are not supported")
    of_eva = re.fullmatch(OF_EVA, architecture)
    # timm's Eva takes a class as its norm_layer, which no config.json can hold.
    choices = {"act_layer": get_args(Activation), "norm_layer": {} if of_eva else NORMS}
    activation, norm_layer = map(changes.get, choices)
    for field, known in choices.items():
        if changes.get(field) is not None:
            check_known(file.path, field, changes[field], known)
    registers = re.search(r"_reg(\d+)", architecture)
    named = int(registers[1]) if registers else 4 * ("_dinov3" in architecture)
    larger = re.fullmatch(LARGER_EPSILON, architecture)
    given: dict[str, Any] = {
        "registers": changes.get("num_reg_tokens" if of_eva else "reg_tokens", named),
        "activation": activation or _activation(file, architecture),
        "norm": NORMS[norm_layer or "layernorm"],
        "norm_epsilon": 1e-5 if not norm_layer and larger else 1e-6,
        "fc_norm": "fc_norm.weight" in file.infos,
        "position_resampling": "bicubic_antialias",
        **rotary,
        **({} if size is None else {"image_size": size}),
    }
    pooling = pretrained.get(
        "global_pool", "avg" if of_eva and "_clip_" not in architecture else None
    )
    pooling = changes.get("global_pool", config.get("global_pool", pooling))
    if pooling == "avg" and "cls_token" in file.infos:
        given["pooling"] = "patch_mean"
    elif pooling not in ("token", "avg", "map", None) and (pooling or "head.weight" in file.infos):
        problem = f"global_pool {pooling!r} cannot be represented; opened are"
        raise UsageError(f"{file.path}: {problem} token, avg, map")
    if (pooling == "token" or of_eva) and "cls_token" not in file.infos:
        raise UsageError(f"{file.path}: cls_token is missing, and global_pool is {pooling!r:.40}")
    qkv_bias = changes.get("qkv_bias", not re.fullmatch(NO_QKV_BIAS, architecture))
    left_out = () if qkv_bias else QKV_BIASES
    if of_eva:
        qkv_bias = changes.get("qkv_bias", not re.search("_dinov3(?!_qkvb)", architecture))
        left_out = ("/key/bias",) if qkv_bias else QKV_BIASES
    if "norm_pre.weight" in file.infos:
        left_out += (PATCH_BIAS,)
    pixels = checked_pixels(*(pretrained.get(name, [0.5] * 3) for name in ("mean", "std")))
    names = config.get("label_names")
    guarded = corrupt_if_wrong(file.path.with_name("config.json"))
    return Family(
        Origin("timm", file.path),
        file,
        renaming(PARAMETERS, heads),
        guarded(functools.partial(_prepared, pretrained)),
        given=given,
        pixels=pixels,
        left_out=left_out,
        class_names=tuple(map(str, names)) if isinstance(names, list) else (),
    )


def _heads(file: ArrayFile, architecture: str, given: Any) -> int:
    found = re.fullmatch(rf"(?:{FAMILIES})_([a-z0-9]+)((?:_(?:{PLAIN}))*)", architecture[:MAX_NAME])
    if found is None or found[1] not in HEADS or len(architecture) > MAX_NAME:
        raise UsageError(
            f"{file.path}: architecture {architecture!r:.{MAX_NAME}} is not a plain ViT of timm; "
            f"those of its families {FAMILIES.replace('|', ', ')} can be opened, such as "
            f"vit_base_patch16_224; sizes: {', '.join(HEADS)}"
        )
    if type(given) is int:
        return given
    if "dinov3" in architecture:
        return 20 if found[1] == "huge" else HEADS[found[1]]
    if "_plus_" in architecture:
        return 14
    if "base_patch16_gap" in architecture:
        return 16
    return 24 if found[1] == "giant" and "dinov2" in architecture else HEADS[found[1]]


def _rotary(architecture: str) -> dict[str, Any]:
    """The fields of rotary positions (timm 1.0.31, models/eva.py)."""
    if architecture.startswith("eva02_"):
        return {"rotary": GridRotary()}
    if "_dinov3" not in architecture:
        return {}
    return {"rotary": CenteredRotary(), "positions": "none", "image_size": 256}


def _activation(file: ArrayFile, architecture: str) -> str:
    if "blocks.0.mlp.fc1_g.weight" in file.infos:
        return "silu"
    up, down = (file.infos.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
    if up and down and up.shape[:1] == tuple(2 * x for x in down.shape[1:]):
        return "silu"  # SwiGLUPacked
    if re.fullmatch(QUICK, architecture):
        return "quick_gelu"
    return "gelu_tanh" if any(re.fullmatch(each, architecture) for each in TANH) else "gelu"


def _prepared(pretrained: Mapping[str, Any], image_size: int) -> tuple[Preprocessing, list[str]]:
    """How timm prepares images for evaluation (timm 1.0.31, data/transforms_factory.py)."""
    interpolation = str(pretrained.get("interpolation", "bicubic"))
    mode = str(pretrained.get("crop_mode") or "center")
    if interpolation not in get_args(Interpolation) or mode not in ("center", "squash"):
        raise UsageError(
            f"config.json: interpolation {interpolation!r} with crop_mode {mode!r} is not supported"
        )
    crop_pct = float(pretrained.get("crop_pct") or 0.875)
    if not LEAST_CROP <= crop_pct <= 1:
        raise UsageError(f"config.json: crop_pct {crop_pct}: use {LEAST_CROP} to 1")
    preprocessing = Preprocessing(
        image_size,
        resize_to=math.floor(image_size / crop_pct),
        keep_aspect=mode == "center",
        interpolation=cast(Interpolation, interpolation),
    )
    declared = {"mean", "std"} <= pretrained.keys()
    return preprocessing, [] if declared else ["pixels normalized by mean 0.5 and std 0.5"]
