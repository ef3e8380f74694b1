"""SigLino's ViTs, with and without experts: ``model.safetensors`` and ``config.json``.

Its names and arithmetic are those of the model code that comes with its weights (arXiv 2512.20157).
Read is the trunk, whose features are the class token. The heads that imitate its teachers, SigLIP 2
and DINOv3, are left out. The frequencies of the rotary positions are computed, not read.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from vmoe.checkpoints.arrays import ArrayFile
from vmoe.checkpoints.family import Family, Transform, corrupt_if_wrong, summary
from vmoe.checkpoints.stored import Origin
from vmoe.checkpoints.torch_layouts import (
    Layout,
    half,
    inputs,
    linear,
    norm,
    output,
    rearranged,
    renaming,
    same,
)
from vmoe.config import BiasBalanced, GatedMlpExpert, GoldenRotary, MoEConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import UsageError, naming

SIDE = 256  # of the largest square images that its image processor makes
LEFT_OUT = (
    *("patches/embed/bias", "/query/bias", "/key/bias", "/value/bias", "/out/bias"),
    *("/up/bias", "/down/bias"),
)
HEADS = r"(dinov3_adapter|siglip2_adapter|layer_norm_dinov3|siglip2_multihead_\w+)\..+"
WEIGHT = r"\.(weight)"


def _patches(found: re.Match[str], heads: int) -> dict[str, Transform]:
    def transform(array: np.ndarray) -> np.ndarray:
        p = math.isqrt(array.shape[1] // 3)
        return rearranged("d (p q c) -> p q c d", heads, p=p, q=p, c=3)(array)

    return {"patches/embed/kernel": transform}


def _experts(path: str) -> Layout:
    return lambda found, heads: {found.expand(path): rearranged("e y x -> e x y", heads)}


BLOCK = r"layers\.(\d+)"
MLP, EXPERTS = rf"{BLOCK}\.feed_forward", rf"{BLOCK}\.moe\.experts"
PARAMETERS: dict[str, Layout] = {
    rf"img_projector{WEIGHT}": _patches,
    "cls_token": same("class_token"),
    "storage_tokens": same("registers"),
    rf"{BLOCK}\.attention_norm{WEIGHT}": norm(r"blocks/\1/norm1"),
    **{
        rf"{BLOCK}\.attention\.w{name[0]}{WEIGHT}": inputs(r"blocks/\1/attention", name)
        for name in ("query", "key", "value")
    },
    rf"{BLOCK}\.attention\.wo{WEIGHT}": output(r"blocks/\1/attention"),
    rf"{BLOCK}\.attention\.sinks": same(r"blocks/\1/attention/sink"),
    rf"{BLOCK}\.ffn_norm{WEIGHT}": norm(r"blocks/\1/norm2"),
    rf"{MLP}\.w1{WEIGHT}": half(r"blocks/\1/mlp/up", 0),
    rf"{MLP}\.w3{WEIGHT}": half(r"blocks/\1/mlp/up", 1),
    rf"{MLP}\.w2{WEIGHT}": linear(r"blocks/\1/mlp/down"),
    rf"{EXPERTS}\.w1": _experts(r"blocks/\1/mlp/experts/up/kernel/0"),
    rf"{EXPERTS}\.w3": _experts(r"blocks/\1/mlp/experts/up/kernel/1"),
    rf"{EXPERTS}\.w2": _experts(r"blocks/\1/mlp/experts/down/kernel"),
    rf"{BLOCK}\.moe\.router\.gate{WEIGHT}": linear(r"blocks/\1/mlp/gate"),
    rf"{BLOCK}\.moe\.expert_bias": same(r"blocks/\1/mlp/state/bias"),
    rf"norm{WEIGHT}": norm("norm"),
    rf"freqs_cis_golden|{HEADS}": lambda found, heads: {},
}


def family(file: ArrayFile, config: Mapping[str, Any]) -> Family:
    """A SigLino, with the content of its config.json."""
    heads = int(config["n_heads"])
    sparse = int(config.get("first_n_layers_dense", 0)) < int(config["n_layers"])
    moe = dict(config["moe_args"]) if sparse else {}
    fixed = {
        "n_kv_heads": (config.get("n_kv_heads"), (heads, None)),
        "parameterized_norm": (config.get("parameterized_norm", True), (True,)),
        "activation": (config.get("activation", "silu"), ("silu",)),
        "moe_args.activation": (moe.get("activation", "silu"), ("silu",)),
        "moe_args.num_shared_experts": (moe.get("num_shared_experts", 0), (0,)),
        "moe_args.score_before_experts": (moe.get("score_before_experts", False), (False,)),
    }
    for name, (value, known) in fixed.items():
        if value not in known:
            raise UsageError(
                f"{file.path}: {name} {value!r:.40} cannot be represented; opened is {known[0]!r}"
            )
    with naming(file.path):
        layer = _layer(moe) if sparse else MoEConfig()
        rotary = GoldenRotary(
            lowest=float(config.get("rope_min_freqs", 1.0)),
            highest=float(config.get("rope_max_freqs", 20.0)),
        )
    given = {
        "pooling": "class_token",
        "registers": int(config.get("n_storage_tokens", 4)),
        "positions": "none",
        "rotary": rotary,
        "image_size": SIDE,
        "norm": "rms",
        "norm_epsilon": float(config.get("norm_eps", 1e-5)),
        "qk_rms": bool(config.get("use_qk_norm", True)),
        "attention_sink": True,
        "activation": "silu",
    }

    @corrupt_if_wrong(file.path.with_name("config.json"))
    def prepared(image_size: int) -> tuple[Preprocessing, list[str]]:
        found = Preprocessing(image_size, interpolation="bicubic", exif=False)
        kept = "(SigLino: aspect kept, 128 to 256 px)"
        return found, [f"{summary(found)} {kept}", "the features are the class token"]

    return Family(
        Origin("siglino", file.path),
        file,
        renaming(PARAMETERS, heads),
        prepared,
        given=given,
        moe=layer,
        left_out=LEFT_OUT,
    )


def _layer(moe: Mapping[str, Any]) -> MoEConfig:
    """The MoE layers, by the settings of the file."""
    router = BiasBalanced(
        k=int(moe["top_k"]),
        scores=moe.get("score_func", "sigmoid"),
        normalize_weights=bool(moe.get("route_norm", False)),
        dropless=True,
    )
    scale = float(moe.get("route_scale", 1.0))
    return MoEConfig(int(moe["num_experts"]), GatedMlpExpert(), router=router, routed_scale=scale)
