"""Models in the files of vision_transformer and big_vision, computed by a forward pass in numpy.

It follows vision_transformer's ``models_vit.py`` and big_vision's ``models/vit.py``, and is checked
with timm: its reader of these files and its ViT must give the same tokens, features and logits.
"""

import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import scipy.ndimage
import timm
import torch

from scripts.maintain.oracles.libraries import GELUS, run_timm
from scripts.maintain.oracles.parameters import CLASSES, Arrays, Shapes, draw

POSITIONS = "Transformer/posembed_input/pos_embedding"
SIZE, PATCH, WIDTH, HEADS, DEPTH = 16, 4, 16, 2, 2
TOKENS = (SIZE // PATCH) ** 2
ATTENTION = "MultiHeadDotProductAttention_0"


def below(prefix: str, values: dict) -> dict:
    return {f"{prefix}/{key}": value for key, value in values.items()}


def within(values: Arrays, prefix: str) -> Arrays:
    start = prefix + "/"
    return {key.removeprefix(start): v for key, v in values.items() if key.startswith(start)}


# Names and shapes, as in big_vision

NORM: Shapes = {"scale": (WIDTH,), "bias": (WIDTH,)}


def dense(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> Shapes:
    return {"kernel": inputs + outputs, "bias": outputs}


def attention_and_mlp() -> Shapes:
    split = (HEADS, WIDTH // HEADS)
    shapes = below(f"{ATTENTION}/out", dense(split, (WIDTH,)))
    for name in ("query", "key", "value"):
        shapes |= below(f"{ATTENTION}/{name}", dense((WIDTH,), split))
    shapes |= below("MlpBlock_0/Dense_0", dense((WIDTH,), (2 * WIDTH,)))
    return shapes | below("MlpBlock_0/Dense_1", dense((2 * WIDTH,), (WIDTH,)))


def vit_shapes(pool: str, positions: str, pre_logits: bool) -> Shapes:
    """``pool``: token, avg or map; ``positions``: with_class, learned or sincos2d."""
    shapes = below("embedding", dense((PATCH, PATCH, 3), (WIDTH,)))
    if pool == "token":
        shapes["cls"] = (1, 1, WIDTH)
    if positions == "with_class":
        shapes[POSITIONS] = (1, TOKENS + 1, WIDTH)
    elif positions == "learned":
        shapes["pos_embedding"] = (1, TOKENS, WIDTH)
    norms = below("LayerNorm_0", NORM) | below("LayerNorm_1", NORM)
    for i in range(DEPTH):
        shapes |= below(f"Transformer/encoderblock_{i}", attention_and_mlp() | norms)
    shapes |= below("Transformer/encoder_norm", NORM)
    if pool == "map":
        probe = {"probe": (1, 1, WIDTH)}
        shapes |= below("MAPHead_0", attention_and_mlp() | below("LayerNorm_0", NORM) | probe)
    if pre_logits:
        shapes |= below("pre_logits", dense((WIDTH,), (WIDTH,)))
    return shapes | below("head", dense((WIDTH,), (CLASSES,)))


# How the files differ


def original(parameters: Arrays) -> Arrays:
    """The names of the published ViT and AugReg files, which number all submodules of a block."""
    renamed = {}
    for key, value in parameters.items():
        key = key.replace(ATTENTION, "MultiHeadDotProductAttention_1")
        key = key.replace("LayerNorm_1", "LayerNorm_2").replace("MlpBlock_0", "MlpBlock_3")
        renamed[key] = value
    return renamed


def in_optimizer(parameters: Arrays) -> Arrays:
    return below("opt/target", original(parameters)) | {"opt/state/step": np.int32(1)}


def big_vision(parameters: Arrays) -> Arrays:
    return below("params", parameters)


def scanned(parameters: Arrays) -> Arrays:
    """All blocks stacked on axis 0, as ``nn.scan`` makes them."""
    stacked: dict[str, list[np.ndarray]] = {}
    for key in sorted(parameters):
        name = re.sub(r"encoderblock_\d+", "encoderblock", key)
        stacked.setdefault(name, []).append(parameters[key])
    return big_vision({k: np.stack(v) if "block/" in k else v[0] for k, v in stacked.items()})


def raw_bfloat16(parameters: Arrays) -> Arrays:
    """bfloat16 arrays as ``np.savez`` stores them: two raw bytes per number."""
    raw = {key: v.astype(ml_dtypes.bfloat16).view("V2") for key, v in parameters.items()}
    return big_vision(raw)


# The forward pass


@dataclass
class NumpyViT:
    """``encode`` makes the arrays of the file from ``parameters``, named as in big_vision."""

    parameters: Arrays
    pool: str
    encode: Callable[[Arrays], Arrays]
    size: int = SIZE

    def write(self, folder: str) -> None:
        Path(folder).mkdir(parents=True)
        np.savez(Path(folder) / "model.npz", **self.encode(self.parameters))

    def outputs(
        self,
        images: np.ndarray,
        dtype: str = "float64",
        gelu: str | None = None,
        epsilon: float | None = None,
    ) -> Arrays:
        gelu, epsilon = gelu or "gelu_tanh", epsilon or 1e-6
        p = {key: value.astype(dtype) for key, value in self.parameters.items()}
        x = embed(p, images.astype(dtype))
        for i in range(DEPTH):
            block = within(p, f"Transformer/encoderblock_{i}")
            y = layer_norm(within(block, "LayerNorm_0"), x, epsilon)
            x = x + attention(within(block, ATTENTION), y, y)
            y = layer_norm(within(block, "LayerNorm_1"), x, epsilon)
            x = x + mlp(within(block, "MlpBlock_0"), y, gelu)
        tokens = layer_norm(within(p, "Transformer/encoder_norm"), x, epsilon)
        features = self.pooled(p, tokens, gelu, epsilon)
        if "pre_logits/kernel" in p:
            features = np.tanh(linear(within(p, "pre_logits"), features))
        logits = linear(within(p, "head"), features)
        return {"features": features, "tokens": tokens, "logits": logits}

    def pooled(self, p: Arrays, tokens: np.ndarray, gelu: str, epsilon: float) -> np.ndarray:
        if self.pool == "token":
            return tokens[:, 0]
        if self.pool == "avg":
            return tokens.mean(1)
        head = within(p, "MAPHead_0")
        x = attention(within(head, ATTENTION), np.repeat(head["probe"], len(tokens), 0), tokens)
        y = layer_norm(within(head, "LayerNorm_0"), x, epsilon)
        return (x + mlp(within(head, "MlpBlock_0"), y, gelu))[:, 0]


def embed(p: Arrays, images: np.ndarray) -> np.ndarray:
    b, i, j = len(images), images.shape[1] // PATCH, images.shape[2] // PATCH
    patches = images.reshape(b, i, PATCH, j, PATCH, 3)
    x = np.einsum("bipjqc,pqcd->bijd", patches, p["embedding/kernel"]) + p["embedding/bias"]
    x = x.reshape(b, i * j, WIDTH)
    if "pos_embedding" in p:
        x = x + resampled(p["pos_embedding"], i, j)
    elif POSITIONS not in p:
        x = x + sincos2d(i, j).astype(x.dtype)
    if "cls" in p:
        x = np.concatenate([np.repeat(p["cls"], b, 0), x], 1)
    return x + resampled(p[POSITIONS], i, j) if POSITIONS in p else x


def resampled(positions: np.ndarray, i: int, j: int) -> np.ndarray:
    """Positions for i x j patches, as by big_vision's ``resample_posemb`` for squares."""
    first, side = positions.shape[1] - TOKENS, SIZE // PATCH
    grid = positions[0, first:].reshape(side, side, WIDTH)
    grid = scipy.ndimage.zoom(grid, (i / side, j / side, 1), order=1)
    return np.concatenate([positions[:, :first], grid.reshape(1, i * j, WIDTH)], 1)


def sincos2d(i: int, j: int) -> np.ndarray:
    """MoCo v3's positions: sin x, cos x, sin y, cos y, a quarter of the width each."""
    y, x = np.mgrid[:i, :j].reshape(2, i * j, 1)
    angles = 10_000.0 ** -(np.arange(WIDTH // 4) / (WIDTH // 4 - 1))
    waves = [np.sin(x * angles), np.cos(x * angles), np.sin(y * angles), np.cos(y * angles)]
    return np.concatenate(waves, 1)[None]


def layer_norm(p: Arrays, x: np.ndarray, epsilon: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * p["scale"] + p["bias"]


def attention(p: Arrays, queries: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    q = np.einsum("bqd,daz->bqaz", queries, p["query/kernel"]) + p["query/bias"]
    k = np.einsum("bnd,daz->bnaz", inputs, p["key/kernel"]) + p["key/bias"]
    v = np.einsum("bnd,daz->bnaz", inputs, p["value/kernel"]) + p["value/bias"]
    scores = np.einsum("bqaz,bnaz->baqn", q, k) / math.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    mixed = np.einsum("baqn,bnaz->bqaz", weights, v)
    return np.einsum("bqaz,azd->bqd", mixed, p["out/kernel"]) + p["out/bias"]


def mlp(p: Arrays, x: np.ndarray, gelu: str) -> np.ndarray:
    hidden = torch.from_numpy(linear(within(p, "Dense_0"), x))
    return linear(within(p, "Dense_1"), GELUS[gelu]()(hidden).numpy())


def linear(p: Arrays, x: np.ndarray) -> np.ndarray:
    return x @ p["kernel"] + p["bias"]


# Models and their check


def npz_model(
    seed: int,
    pool: str,
    positions: str,
    encode: Callable[[Arrays], Arrays],
    small: bool = False,
    pre_logits: bool = False,
) -> NumpyViT:
    parameters = draw(vit_shapes(pool, positions, pre_logits), seed, small)
    if encode is raw_bfloat16:
        for key, value in parameters.items():
            parameters[key] = value.astype(ml_dtypes.bfloat16).astype(np.float32)
    return NumpyViT(parameters, pool, encode)


def outputs_of_timm(model: NumpyViT, images: np.ndarray) -> Arrays:
    """The outputs of timm, whose own reader has read the file.

    timm gets sin-cos positions as learned ones and bfloat16 as float32. It drops pre-logits; then
    only the tokens are returned.
    """
    values = model.encode(model.parameters)
    if model.encode is raw_bfloat16:
        values = big_vision(model.parameters)
    if not any("pos_embedding" in key for key in values):
        values["params/pos_embedding"] = np.float32(sincos2d(SIZE // PATCH, SIZE // PATCH))
    module = timm.create_model(
        "vit_tiny_patch16_224",
        **dict(img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS),
        **dict(mlp_ratio=2, num_classes=CLASSES, act_layer="gelu_tanh", global_pool=model.pool),
        class_token=model.pool == "token",
        no_embed_class=POSITIONS not in model.parameters,
        fc_norm=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "model.npz", **values)
        module.load_pretrained(str(Path(folder) / "model.npz"))
    pixels = torch.from_numpy(images.astype(np.float64).transpose(0, 3, 1, 2))
    with torch.no_grad():
        outputs = {k: v.numpy() for k, v in run_timm(module.eval().double(), pixels).items()}
    return {"tokens": outputs["tokens"]} if "pre_logits/kernel" in model.parameters else outputs
