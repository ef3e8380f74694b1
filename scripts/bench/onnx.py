"""Compares exported ONNX files, run by ONNX Runtime and OpenVINO, with the models in JAX.

    python -m scripts.bench.onnx [MODEL ...] [--env .cache/onnx]

It makes an environment on top of the current one, with jax2onnx and the runtimes, and prints a
table. All parameters are random. For each model and 8 images:

- the largest difference of the logits in each runtime, relative to the largest logit;
- the number of filled slots that hold another token than in the model;
- the size of the file;
- milliseconds per image of each runtime and of the model in JAX on this CPU: the best of 5 runs.
"""

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import timeit
import venv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vmoe import models
from vmoe.checkpoints.export import onnx_file
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.config import ExpertChoice, TokenChoice, ViTConfig, replace
from vmoe.config.preprocessing import Preprocessing
from vmoe.nn.vit import ViT

ROOT = Path(__file__).parents[2]
INSIDE = "--inside"  # this process runs in the environment
RUNTIMES = "pip install onnxruntime==1.32.0 openvino==2026.4.1"
IMAGES, RUNS = 8, 5
HEADER = (
    "model",
    "difference, ONNX Runtime",
    "OpenVINO",
    "other slots",
    "MB",
    "ms, ONNX Runtime",
    "OpenVINO",
    "JAX",
)


def _config(name: str, router: TokenChoice | ExpertChoice | None = None) -> ViTConfig:
    router = replace(router or TokenChoice(), images_per_group=1)
    sparse = dict(moe=dict(exchange=dict(dtype="float32"), router=router))
    return models.model_config(name, head_std=1.0, **(sparse if name.startswith("vmoe") else {}))


MODELS = {
    "vit_b16": _config("vit_b16"),
    "vmoe_s32_last2_e8": _config("vmoe_s32_last2_e8"),
    "vmoe_s32_last2_e8:largest_gate:0.5": _config(
        "vmoe_s32_last2_e8", TokenChoice(capacity_factor=0.5, priority="largest_gate")
    ),
    "vmoe_s32_last2_e8:expert_choice": _config("vmoe_s32_last2_e8", ExpertChoice()),
    "vmoe_b16_every2_e8": _config("vmoe_b16_every2_e8"),
}


def make_environment(env: Path) -> Path:
    """An environment that sees the packages of the current one; returns its Python."""
    scheme = {"base": str(env), "platbase": str(env)}
    python = Path(sysconfig.get_path("scripts", "venv", scheme), "python")
    complete = env / "complete"
    if not complete.exists():
        venv.create(env, with_pip=True, clear=True)
        packages = Path(sysconfig.get_path("purelib", "venv", scheme))
        (packages / "outer.pth").write_text(sysconfig.get_path("purelib"))
        for command in (*onnx_file.INSTALL.split(" && "), RUNTIMES):
            subprocess.run([python, "-m", *command.split(), "--quiet"], check=True)
        complete.touch()
    return python


def random_model(config: ViTConfig) -> StoredModel:
    """A model whose parameters are all random, biases included."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: np.asarray(x + rng.normal(0, 0.02, x.shape), np.float32),
        nnx.to_pure_dict(nnx.state(models.build(config), nnx.Param)),
    )
    origin = Origin("vmoe", Path("random"))
    return StoredModel(config, params, (), Preprocessing(config.image_size), None, origin)


def compare(name: str, folder: Path) -> list[str]:
    """A row of the table."""
    import onnxruntime
    import openvino

    stored, path = random_model(MODELS[name]), folder / "model.onnx"
    size = stored.config.image_size
    images = np.random.default_rng(1).uniform(-1, 1, (IMAGES, size, size, 3)).astype(np.float32)
    model = models.with_params(stored.config, jax.tree.map(jnp.asarray, stored.params))
    forward = jax.jit(model.forward)
    onnx_file.write(path, stored)
    session = onnxruntime.InferenceSession(path)
    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    runs: list[Callable[[], np.ndarray]] = [
        lambda: session.run(["logits"], {"images": images})[0],
        lambda: compiled({"images": images})["logits"],
        lambda: np.asarray(forward(images)[0]),
    ]
    *found, expected = (run() for run in runs)
    differences = [np.abs(logits - expected).max() / np.abs(expected).max() for logits in found]
    return [
        name,
        *(f"{difference:.1e}" for difference in differences),
        other_slots(stored, model, images),
        f"{path.stat().st_size / 1e6:.0f}",
        *(f"{1e3 * min(timeit.repeat(run, number=1, repeat=RUNS)) / IMAGES:.0f}" for run in runs),
    ]


def other_slots(stored: StoredModel, model: ViT, images: np.ndarray) -> str:
    """The number of filled slots whose token in ONNX Runtime differs from the model's."""
    import onnxruntime

    blocks = stored.config.sparse_blocks
    if not blocks:
        return "-"
    exported = onnx_file.without_scatters(stored.config, stored.params)

    def tokens(image: jax.Array) -> list[jax.Array]:
        """Same as ``Routing.tokens``: s where a slot is empty."""
        records: dict[int, Any] = exported.forward(image[None])[1]
        filled = [records[block].routing.dispatch for block in blocks]
        before_empty = jnp.arange(filled[0].shape[1], 0.0, -1.0)  # s - token
        return [len(before_empty) - jnp.einsum("gsec,s->ec", each, before_empty) for each in filled]

    shape = (stored.config.image_size, stored.config.image_size, 3)
    names = [f"tokens{block}" for block in blocks]
    proto = onnx_file.convert(tokens, "images", shape, names)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    found = session.run(None, {"images": images})
    records: dict[int, Any] = model.forward(images)[1]
    own = [np.asarray(records[block].routing.tokens) for block in blocks]
    filled = sum(int((each < records[blocks[0]].gates.shape[1]).sum()) for each in own)
    differing = sum(int((x != y).sum()) for x, y in zip(found, own, strict=True))
    return f"{differing} of {filled:,}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--env", type=Path, default=ROOT / ".cache" / "onnx")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.inside:
        command = [make_environment(args.env), "-m", "scripts.bench.onnx", INSIDE, *args.models]
        sys.exit(subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode)
    print(f"| {' | '.join(HEADER)} |\n{'|---' * len(HEADER)}|")
    for name in args.models or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            print(f"| {' | '.join(compare(name, Path(folder)))} |", flush=True)


if __name__ == "__main__":
    main()
