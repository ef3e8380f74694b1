"""ViTs of Hugging Face's transformers: a folder with ``model.safetensors`` and ``config.json``."""

import re
from collections.abc import Mapping
from typing import Any

from vmoe.checkpoints.arrays import ArrayFile
from vmoe.checkpoints.family import (
    Family,
    check_known,
    checked_pixels,
    corrupt_if_wrong,
    read_json,
    side_of,
    summary,
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
from vmoe.config import CenteredRotary
from vmoe.config.preprocessing import Interpolation, Preprocessing
from vmoe.errors import UsageError

IMAGES = "preprocessor_config.json"
MODELS = ("vit", "deit", "dinov2", "dinov2_with_registers", "dinov3_vit")
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "silu": "silu",
    "relu": "relu",
}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3}
# The defaults of transformers, for settings that the two JSON files do not have.
PIXELS = {"vit": HALF}  # the others: IMAGENET
EPSILONS = {"vit": 1e-12, "deit": 1e-12, "dinov3_vit": 1e-5}  # the others: 1e-6
RESAMPLES: dict[int, Interpolation] = {  # Pillow's numbers; transformers resizes by torchvision
    0: "nearest",
    1: "torch_lanczos",
    2: "torch_bilinear",
    3: "torch_bicubic",
}

MODEL = rf"(?:(?:{'|'.join(MODELS)})\.)?"
BLOCK = rf"{MODEL}(?:encoder\.layer|layers|(?:model\.)?layer)\.(\d+)"
PARAMETERS: dict[str, Layout] = {
    rf"{MODEL}embeddings\.patch_embeddings\.(?:projection\.)?{PARAM}": patches("patches/embed"),
    rf"{MODEL}embeddings\.cls_token": same("class_token"),
    rf"{MODEL}embeddings\.register_tokens": same("registers"),
    rf"{MODEL}embeddings\.position_embeddings": same("positions/embedding"),
    rf"{BLOCK}\.(?:layernorm_before|norm1)\.{PARAM}": norm(r"blocks/\1/norm1"),
    rf"{BLOCK}\.(?:layernorm_after|norm2)\.{PARAM}": norm(r"blocks/\1/norm2"),
    **{
        rf"{BLOCK}\.attention\.(?:attention\.{name}|{name[0]}_proj)\.{PARAM}": inputs(
            r"blocks/\1/attention", name
        )
        for name in ("query", "key", "value")
    },
    rf"{BLOCK}\.attention\.(?:output\.dense|o_proj)\.{PARAM}": output(r"blocks/\1/attention"),
    rf"{BLOCK}\.layer_scale1\.lambda1": same(r"blocks/\1/attention/out/scale"),
    rf"{BLOCK}\.(?:intermediate\.dense|mlp\.fc1)\.{PARAM}": linear(r"blocks/\1/mlp/up"),
    rf"{BLOCK}\.(?:output\.dense|mlp\.fc2)\.{PARAM}": linear(r"blocks/\1/mlp/down"),
    rf"{BLOCK}\.mlp\.weights_in\.{PARAM}": linear(r"blocks/\1/mlp/up"),
    rf"{BLOCK}\.mlp\.gate_proj\.{PARAM}": half(r"blocks/\1/mlp/up", 0),
    rf"{BLOCK}\.mlp\.up_proj\.{PARAM}": half(r"blocks/\1/mlp/up", 1),
    rf"{BLOCK}\.mlp\.(?:weights_out|down_proj)\.{PARAM}": linear(r"blocks/\1/mlp/down"),
    rf"{BLOCK}\.layer_scale2\.lambda1": same(r"blocks/\1/mlp/down/scale"),
    rf"{MODEL}(?:layernorm|norm)\.{PARAM}": norm("norm"),
    rf"{MODEL}pooler\.dense\.{PARAM}": linear("head/pre_logits"),
    rf"classifier\.{PARAM}": linear("head/classes"),
}
PLAIN: dict[str, Layout] = {rf"{BLOCK}\.mlp\.up_proj\.{PARAM}": linear(r"blocks/\1/mlp/up")}
BIASES = {  # of DINOv3, which config.json can leave out -> ends of their paths
    **{name: (f"/{name}/bias",) for name in ("query", "key", "value")},
    **{"proj": ("/out/bias",), "mlp": ("/mlp/up/bias", "/mlp/down/bias")},
}


def family(file: ArrayFile, config: Mapping[str, Any]) -> Family:
    """A ViT of transformers, with the content of its config.json."""
    kind = config["model_type"]
    images_file = file.path.with_name(IMAGES)
    images = read_json(images_file)
    if kind not in MODELS:
        known = ", ".join((*MODELS, "siglino"))
        raise UsageError(f"{file.path}: model_type {kind!r} cannot be opened; choose from {known}")
    swiglu = config.get("use_swiglu_ffn", False)  # of DINOv2, whatever hidden_act is
    activation = "silu" if swiglu else config.get("hidden_act", "gelu")
    check_known(file.path, "hidden_act", activation, ACTIVATIONS)
    with_registers = kind == "dinov2_with_registers"
    given = {
        "pooling": "class_token",
        "registers": config.get("num_register_tokens", 4 * with_registers),
        "position_resampling": "bicubic_antialias" if with_registers else "bicubic",
        "activation": ACTIVATIONS[activation],
        "norm_epsilon": float(config.get("layer_norm_eps", EPSILONS.get(kind, 1e-6))),
        "image_size": side_of(config.get("image_size", 224)),
    }
    if (act := config.get("pooler_act", "tanh")) != "tanh":
        raise UsageError(f"{file.path}: pooler_act {act!r} cannot be represented")
    if kind == "dinov3_vit":
        given |= dict(
            positions="none",
            rotary=CenteredRotary(base=float(config.get("rope_theta", 100.0))),
        )
    elif not any(name.endswith("position_embeddings") for name in file.infos):
        raise UsageError(f"{file.path}: it has no position_embeddings")
    rules = PARAMETERS if swiglu or config.get("use_gated_mlp") else PARAMETERS | PLAIN
    left_out = () if config.get("qkv_bias", True) else QKV_BIASES
    if kind == "dinov3_vit":
        left_out = tuple(
            path
            for name, paths in BIASES.items()
            for path in paths
            if not config.get(f"{name}_bias", name != "key")
        )
    mean, std = _normalization(kind, images)
    pixels = checked_pixels(mean, std)

    @corrupt_if_wrong(images_file)
    def prepared(image_size: int) -> tuple[Preprocessing, list[str]]:
        found, assumed = preprocessing(images, image_size), []
        if not images:
            assumed += [summary(found), f"pixels normalized by mean {mean} and std {std}"]
        return found, assumed

    return Family(
        Origin("hugging_face", file.path),
        file,
        renaming(rules, int(config.get("num_attention_heads", 12))),
        prepared,
        given=given,
        pixels=pixels,
        left_out=left_out,
        class_names=_class_names(config),
    )


def _normalization(kind: str, images: Mapping[str, Any]) -> tuple[Any, Any]:
    """The mean and the standard deviation by which pixels in [0, 1] are normalized."""
    if (
        not images.get("do_rescale", True)
        or abs(images.get("rescale_factor", 1 / 255) * 255 - 1) > 1e-6
    ):
        raise UsageError(
            f"preprocessor_config.json: do_rescale {images.get('do_rescale')!r:.20}, "
            f"rescale_factor {images.get('rescale_factor')!r:.20}: use pixels in [0, 1]"
        )
    if not images.get("do_normalize", True):
        return [0.0] * 3, [1.0] * 3
    default = PIXELS.get(kind, IMAGENET)
    return images.get("image_mean", default["mean"]), images.get("image_std", default["std"])


def preprocessing(images: Mapping[str, Any], image_size: int) -> Preprocessing:
    """How transformers prepares images, by the content of preprocessor_config.json."""
    size, resample = images.get("size", image_size), images.get("resample", 2)
    if resample not in RESAMPLES:
        raise UsageError(f"preprocessor_config.json: resample {resample!r} is not supported")
    if not isinstance(size, Mapping):
        size = {"height": size, "width": size}
    keep_aspect = "shortest_edge" in size
    side: Any = size["shortest_edge"] if keep_aspect else size.get("height")
    if not keep_aspect and side != size.get("width"):
        raise UsageError(f"preprocessor_config.json: size {dict(size)} is not square")
    crop: Any = images.get("crop_size", side) if images.get("do_center_crop") else side
    crop = crop["height"] if isinstance(crop, Mapping) else crop
    return Preprocessing(
        int(crop), resize_to=int(side), keep_aspect=keep_aspect, interpolation=RESAMPLES[resample]
    )


def _class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of the classes; empty if config.json has none or only LABEL_0, LABEL_1, ..."""
    names = config.get("id2label")
    if not isinstance(names, Mapping):
        return ()
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    generic = all(re.fullmatch(r"LABEL_\d+", name) for name in ordered)
    return () if generic else ordered
