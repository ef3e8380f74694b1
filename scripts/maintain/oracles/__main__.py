"""Writes the oracles that other libraries compute.

These are small random models of every family of ViT weights with the outputs of the family's own
library, results of torchvision's augmentations (``tests/golden/augment``, ``oracles/augment.py``)
and of transformers' image processors (``tests/golden/preprocess``, ``oracles/images.py``).

    pip install -e '.[oracles]'
    python -m scripts.maintain.oracles [--out tests/golden/weights]

- Each folder has a model as its library saves it, and ``expected.npz``: ``images`` f32[2 h w 3] in
  [-1, 1], ``logits``, ``features`` (the classifier's input), ``tokens`` (after the last norm).
- Those of ``RESIZED``, one for each way of a family to treat images of another size, also have
  ``resized.npz``: the same for images of ``OTHER_SIZE``, fewer rows and more columns of patches.
- The library gets the same images after its own normalization, and computes in float64 from the
  float32 weights.
- Every parameter is random. In models named ``*_eps`` the tokens are about 1e-3, so that their
  variance is near the epsilon of the norms.
- The seed is the first one for which every other GELU (and in a ``*_eps`` model every other
  epsilon) changes the outputs by more than 1e-3 of their largest value, and rounding to float32 by
  less than 2e-6. If there is no such seed, the script fails.
- The libraries that write ``.npz`` files are not on PyPI: a forward pass in numpy computes those
  models, and timm, which reads these files, must get the same (``oracles/npz.py``).
- ``refused/`` holds models that are not plain ViTs.
"""

import argparse
import importlib.metadata
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import transformers

from scripts.experiments.framework.pages import markdown_table
from scripts.maintain.oracles import augment, images
from scripts.maintain.oracles.libraries import (
    GELUS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    hf_dinov2,
    hf_dinov3,
    hf_pooler,
    hf_vit,
    timm_model,
)
from scripts.maintain.oracles.npz import (
    NumpyViT,
    big_vision,
    in_optimizer,
    npz_model,
    original,
    outputs_of_timm,
    raw_bfloat16,
    scanned,
)
from scripts.maintain.oracles.parameters import LABELS, Arrays, Model
from scripts.maintain.oracles.refused import REFUSED

EPSILONS = (1e-5, 1e-6, 1e-12)
LIBRARIES = ("timm", "transformers", "torch", "safetensors", "numpy")
OTHER_SIZE = 8, 24
RESIZED = (
    *("timm_vit", "timm_layer_scale", "timm_siglip", "timm_clip", "timm_register_positions"),
    *("timm_eva", "timm_eva02", "timm_eva02_clip", "timm_dinov3"),
    *("hf_vit", "hf_dinov2", "hf_dinov2_registers", "hf_dinov3"),
    *("augreg", "big_vision_map", "big_vision_sincos"),
)


@dataclass(frozen=True)
class Oracle:
    """A model's description, GELU and epsilon, and the function that builds it from a seed."""

    note: str
    gelu: str
    epsilon: float
    build: Callable[..., Model]
    arguments: tuple = ()
    options: dict | None = None

    def model(self, seed: int) -> Model:
        return self.build(seed, *self.arguments, **(self.options or {}))


def of_timm(note: str, architecture: str, gelu: str = "gelu", **options: object) -> Oracle:
    larger = re.match("vit_.*(clip|dinov3)", architecture)
    epsilon = 1e-5 if larger else 1e-6
    return Oracle(note, gelu, epsilon, timm_model, (architecture,), options)


def of_npz(note: str, *arguments: object, **options: object) -> Oracle:
    return Oracle(note, "gelu_tanh", 1e-6, npz_model, arguments, options)


SHARDS = "as `hf_vit`, in shards with `model.safetensors.index.json`"
ORACLES = {
    "timm_vit": of_timm(
        "class token; 3 heads, known from the architecture only; `label_names`",
        "vit_tiny_patch16_224",
        embed_dim=24,
        labels=LABELS,
    ),
    "timm_vit_eps": of_timm(
        "as `timm_vit`, small tokens, 2 heads in `model_args`",
        "vit_small_patch16_224",
        num_heads=2,
        small=True,
    ),
    "timm_layer_scale": of_timm(
        "layer scale; `pos_embed` without the class token's",
        "deit3_small_patch16_224",
        num_heads=2,
        init_values=1e-4,
    ),
    "timm_avg": of_timm(
        "no class token, mean of the tokens, then `fc_norm`; no `norm`",
        "vit_small_patch16_224",
        num_heads=2,
        class_token=False,
        global_pool="avg",
    ),
    "timm_avg_class_token": of_timm(
        "a class token, but the mean of the patches only, then `fc_norm` (as fine-tuned MAE)",
        "vit_small_patch16_224",
        num_heads=2,
        global_pool="avg",
    ),
    "timm_gap": of_timm(
        "no class token, `norm`, then the mean; 16 heads",
        "vit_base_patch16_gap_224",
        embed_dim=32,
    ),
    "timm_siglip": of_timm(
        "attention pooling; exact GELU",
        "vit_base_patch16_siglip_224",
        num_heads=2,
    ),
    "timm_siglip_tanh": of_timm(
        "attention pooling; tanh, known from the architecture only; 16 heads",
        "vit_so400m_patch16_siglip_256",
        gelu="gelu_tanh",
    ),
    "timm_clip": of_timm(
        "`norm_pre`, no bias of the patches; patches of 8, images of 32; 12 heads",
        "vit_base_patch16_clip_quickgelu_224.openai",
        gelu="quick_gelu",
        patch_size=8,
        img_size=32,
        embed_dim=24,
    ),
    "timm_clip_eps": of_timm(
        "as `timm_clip`, small tokens, before and after `norm_pre`",
        "vit_base_patch16_clip_quickgelu_224.openai",
        gelu="quick_gelu",
        small=True,
        num_heads=2,
    ),
    "timm_features": of_timm(
        "no head (`num_classes` 0); 6 heads",
        "vit_small_patch16_224.dino",
        embed_dim=24,
        num_classes=0,
    ),
    "timm_no_qkv_bias": of_timm(
        "no `attn.qkv.bias`; mean 0, std 1; 12 heads",
        "vit_base_patch16_224_miil",
        embed_dim=24,
    ),
    "timm_registers": of_timm(
        "4 registers, of which none is pooled, and no position for them and the class token",
        "vit_small_patch14_reg4_dinov2",
        num_heads=2,
        init_values=1e-5,
    ),
    "timm_registers_gap": of_timm(
        "one register without a class token, mean of the patches, then `fc_norm`; layer scale",
        "vit_wee_patch16_reg1_gap_256",
        embed_dim=16,
    ),
    "timm_register_positions": of_timm(
        "as `timm_registers_gap`, with a position for the register; no `attn.qkv.bias`; 13 heads",
        "vit_so150m2_patch16_reg1_gap_256",
        embed_dim=26,
    ),
    "timm_gated": of_timm(
        "a gated MLP, as in DINOv2's giant: `SwiGLUPacked`; 24 heads",
        "vit_giant_patch14_reg4_dinov2",
        gelu="silu",
        embed_dim=24,
        init_values=1e-5,
    ),
    "timm_rms": of_timm(
        "RMSNorm: `norm_layer` in `model_args`",
        "vit_small_patch16_224",
        num_heads=2,
        norm_layer="rmsnorm",
    ),
    "timm_dinov3": of_timm(
        "rotary positions only, 4 registers, layer scale, no bias of queries, keys and values",
        "vit_small_patch16_dinov3",
        num_heads=2,
        global_pool="token",
    ),
    "timm_dinov3_gated": of_timm(
        "as `timm_dinov3`, gated, with biases of queries and values; mean of the patches",
        "vit_huge_plus_patch16_dinov3_qkvb",
        gelu="silu",
        num_heads=2,
    ),
    "timm_eva02": of_timm(
        "rotary positions in a grid of 16, learned ones, packed gated MLP, `q_bias`, `v_bias`",
        "eva02_tiny_patch14_224",
        gelu="silu",
        embed_dim=24,
    ),
    "timm_eva02_norm": of_timm(
        "as `timm_eva02`, MLP with an inner norm and separate arrays; `q_proj`, `k_proj`, `v_proj`",
        "eva02_base_patch14_224",
        gelu="silu",
        num_heads=2,
    ),
    "timm_eva02_clip": of_timm(
        "as `timm_eva02_norm`, with a norm of the attention's heads and the class token",
        "eva02_base_patch16_clip_224",
        gelu="silu",
        num_heads=2,
    ),
    "timm_eva": of_timm(
        "`Eva` without rotary positions: `q_bias`, `v_bias`; 16 heads",
        "eva_giant_patch14_224",
        embed_dim=32,
    ),
    "hf_vit": Oracle("class token; `id2label`", "gelu", 1e-12, hf_vit),
    "hf_vit_shards": Oracle(SHARDS, "gelu", 1e-12, hf_vit, options={"max_shard_size": "20KB"}),
    "hf_vit_new_names": Oracle(
        "`save_original_format=False`: `vit.layers.i.attention.q_proj`, ...",
        "gelu",
        1e-12,
        hf_vit,
        options=dict(mean=IMAGENET_MEAN, std=IMAGENET_STD, save_original_format=False),
    ),
    "hf_vit_eps": Oracle(
        "as `hf_vit`, small tokens", "gelu", 1e-12, hf_vit, options={"small": True}
    ),
    "hf_pooler": Oracle(
        "`ViTModel`: no `vit.` prefix, no classifier; features are the pooler's: dense, tanh",
        "gelu",
        1e-12,
        hf_pooler,
    ),
    "hf_dinov2": Oracle(
        "`Dinov2Model`: layer scale, unused `mask_token`, no classifier; features: the class token",
        "gelu",
        1e-6,
        hf_dinov2,
    ),
    "hf_dinov2_registers": Oracle(
        "`Dinov2WithRegistersModel`: as `hf_dinov2`, with 4 registers",
        "gelu",
        1e-6,
        hf_dinov2,
        options={"registers": 4},
    ),
    "hf_dinov2_gated": Oracle(
        "as `hf_dinov2`, with a gated MLP: `use_swiglu_ffn`",
        "silu",
        1e-6,
        hf_dinov2,
        options={"use_swiglu_ffn": True},
    ),
    "hf_dinov2_gated_new_names": Oracle(
        "as `hf_dinov2_gated`, `save_original_format=False`: `gate_proj`, `up_proj`",
        "silu",
        1e-6,
        hf_dinov2,
        options={"use_swiglu_ffn": True, "save_original_format": False},
    ),
    "hf_dinov3": Oracle(
        "`DINOv3ViTModel`: rotary positions only, 4 registers, layer scale, no bias of keys",
        "gelu",
        1e-5,
        hf_dinov3,
    ),
    "hf_dinov3_gated": Oracle(
        "as `hf_dinov3`, with a gated MLP: `gate_proj`, `up_proj`",
        "silu",
        1e-5,
        hf_dinov3,
        options={"use_gated_mlp": True, "hidden_act": "silu"},
    ),
    "augreg": of_npz("AugReg's names, no pre-logits", "token", "with_class", original),
    "augreg_eps": of_npz("as `augreg`, small tokens", "token", "with_class", original, small=True),
    "vit_pre_logits": of_npz(
        "the original ViT: features are tanh of `pre_logits`",
        "token",
        "with_class",
        original,
        pre_logits=True,
    ),
    "vit_in_optimizer": of_npz(
        "as `augreg`, below `opt/target/`, with an `opt/state/step`",
        "token",
        "with_class",
        in_optimizer,
    ),
    "big_vision_token": of_npz(
        "class token; positions without one for it", "token", "learned", big_vision
    ),
    "big_vision_map": of_npz("attention pooling, `MAPHead_0`", "map", "learned", big_vision),
    "big_vision_sincos": of_npz(
        "mean of the tokens; sin-cos positions, not in the file", "avg", "sincos2d", big_vision
    ),
    "big_vision_scanned": of_npz(
        "blocks stacked on axis 0 below `encoderblock/`", "avg", "learned", scanned
    ),
    "big_vision_bfloat16": of_npz(
        "bfloat16 as two raw bytes, dtype `V2`", "avg", "learned", raw_bfloat16
    ),
}


def images_of(h: int, w: int) -> np.ndarray:
    """Two random images, with a different mean in each channel."""
    pixels = np.random.default_rng(h).uniform(-0.7, 0.7, (2, h, w, 3))
    return (pixels + [-0.3, 0.1, 0.25]).astype(np.float32)


def change(expected: Arrays, others: Arrays) -> float:
    """The largest difference of the logits, or the features, relative to the largest value."""
    key = "logits" if "logits" in expected else "features"
    return float(np.abs(others[key] - expected[key]).max() / np.abs(expected[key]).max())


class Sensitivity(NamedTuple):
    """Changes of the outputs by the nearest other GELU, the nearest other epsilon and float32."""

    gelu: float
    epsilon: float
    rounding: float

    def suits(self, name: str) -> bool:
        """Whether other GELUs (and epsilons) show, but rounding errors, also amplified, do not."""
        near = self.gelu < 3e-3 or re.search("clip|gated|eva02", name)
        seen = self.gelu > 1e-3 and (self.epsilon > 1e-3 or not name.endswith("_eps"))
        return seen and bool(near) and self.rounding < 2e-6


def sensitivity(model: Model, oracle: Oracle, images: np.ndarray) -> Sensitivity:
    expected = model.outputs(images)
    same = change(expected, model.outputs(images, gelu=oracle.gelu, epsilon=oracle.epsilon))
    assert same == 0, f"{oracle.note}: the GELU or the epsilon is another one"
    others = [model.outputs(images, gelu=gelu) for gelu in GELUS if gelu != oracle.gelu]
    gelu = min(change(expected, outputs) for outputs in others)
    others = [model.outputs(images, epsilon=e) for e in EPSILONS if e != oracle.epsilon]
    epsilon = min(change(expected, outputs) for outputs in others)
    return Sensitivity(gelu, epsilon, change(expected, model.outputs(images, dtype="float32")))


def find(name: str, oracle: Oracle) -> tuple[Model, np.ndarray, Sensitivity]:
    """The model of the first seed that suits, its images and its sensitivity."""
    for seed in range(100):
        model = oracle.model(seed)
        images = images_of(model.size, model.size)
        found = sensitivity(model, oracle, images)
        if found.suits(name):
            return model, images, found
    raise SystemExit(f"{name}: no seed makes another GELU or epsilon visible, the last one {found}")


def write(name: str, oracle: Oracle, folder: Path) -> list[str]:
    """Writes a model and its outputs, and returns its row of the table."""
    model, images, found = find(name, oracle)
    expected = model.outputs(images)
    if isinstance(model, NumpyViT):
        for key, value in outputs_of_timm(model, images).items():
            np.testing.assert_allclose(expected[key], value, rtol=0, atol=1e-6, err_msg=name)
    model.write(str(folder))
    save(folder / "expected.npz", images, expected)
    if name in RESIZED:
        images = images_of(*OTHER_SIZE)
        expected = model.outputs(images)
        assert change(expected, model.outputs(images, dtype="float32")) < 4e-6, name
        save(folder / "resized.npz", images, expected)
    kilobytes = sum(file.stat().st_size for file in folder.iterdir()) / 1000
    figures = [f"{figure:.1e}" for figure in found]
    return [f"`{name}`", oracle.note, *settings(oracle, model), f"{kilobytes:.0f}", *figures]


def save(file: Path, images: np.ndarray, outputs: Arrays) -> None:
    stored: Arrays = {key: np.float32(value) for key, value in outputs.items()}
    np.savez(file, images=images, **stored)


def settings(oracle: Oracle, model: Model) -> tuple[str, str, str]:
    pixels = [getattr(model, field, (0.5,) * 3) for field in ("mean", "std")]
    shown = " / ".join(", ".join(f"{v:.3g}" for v in dict.fromkeys(values)) for values in pixels)
    return oracle.gelu, f"{oracle.epsilon:.0e}", shown


README = """# Models of other libraries, and their outputs

Written by `python -m scripts.maintain.oracles` with
{versions}.
Every parameter is random. `expected.npz` has `images` in [-1, 1] and the `logits`, `features` and
`tokens` that the family's library computes in float64 after its own normalization (mean / std of
pixels in [0, 1]). The last columns are changes of the logits (of the features without a head),
relative to the largest value: with the nearest other GELU, with the nearest other epsilon of
{epsilons}, and in float32.

{oracles}

The models from `augreg` on are computed in numpy and checked with timm, which reads the same files:
tokens, features and logits agree to 1e-6. timm gets sin-cos positions as learned ones and bfloat16
as float32. It drops pre-logits, so only the tokens of `vit_pre_logits` are compared.

`resized.npz` has the same for images of {h} x {w} pixels, fewer rows and more columns of patches.
timm gets them after `set_input_size`, and transformers' ViT with `interpolate_pos_encoding`. The
models in numpy resample positions by `scipy.ndimage.zoom` of order 1, as vision_transformer and
big_vision do for squares; timm's reader of their files does not.

`siglino_moe` and `siglino_dense` are not written by this script: the model code that comes with
SigLino's weights (arXiv 2512.20157) computed them, as it was on GitHub in the spring of 2026. It is
no package, and no licence of it could be read. They have small heads for the teachers, a bias of
the choice, and `experts0` and `experts1`, i32[2 n k]: the experts that each token chooses.

## Refused
Reading these models raises an error, since they are not plain ViTs. They have no `expected.npz`.

{refused}
"""


def write_all(out: Path) -> str:
    """Replaces the folders below ``out`` and returns the text of its README."""
    rows = []
    for name, oracle in ORACLES.items():
        shutil.rmtree(out / name, ignore_errors=True)
        rows.append(write(name, oracle, out / name))
        print(*rows[-1][:1], *rows[-1][2:], sep="  ", flush=True)
    shutil.rmtree(out / "refused", ignore_errors=True)
    for name, refused in REFUSED.items():
        refused.write(str(out / "refused" / name))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    header = ["folder", "what it is", "GELU", "epsilon", "mean / std", "kB"]
    return README.format(
        versions=versions,
        epsilons=", ".join(f"{e:.0e}" for e in EPSILONS),
        oracles=markdown_table([*header, "other GELU", "other epsilon", "float32"], rows),
        h=OTHER_SIZE[0],
        w=OTHER_SIZE[1],
        refused=markdown_table(
            ["folder", "why"], [[f"`{name}`", refused.reason] for name, refused in REFUSED.items()]
        ),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    root = Path(__file__).parents[3]
    parser.add_argument("--out", type=Path, default=root / "tests" / "golden" / "weights")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    augment.write(root / "tests" / "golden" / "augment" / "torchvision.npz")
    images.write(root / "tests" / "golden" / "preprocess" / "transformers.npz")
    text = write_all(out)
    (out / "README.md").write_text(text)
    total = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out}: {len(ORACLES)} models, {len(REFUSED)} refused ones, {total / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
