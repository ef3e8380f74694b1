"""The rows of ``gpu_check``, most telling first; each yields figures, and what it skips and why.

A first run of each program is not measured. Programs of one comparison run in turn.
"""

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scripts.bench.image_files import write_jpegs
from scripts.bench.layer import of_module
from scripts.bench.measure import Program, both_ways, compiled, machine, measured
from scripts.bench.model import forward_pass, training_step
from tests.published import Golden, difference
from vmoe.config import (
    EvalConfig,
    MlpExpert,
    MoEConfig,
    TokenChoice,
    TrainConfig,
    load,
    replace,
)
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.train import ANY_LENGTH
from vmoe.costs import flops
from vmoe.data.pipeline import start_workers, training_batches
from vmoe.data.reading import AHEAD, read_ahead
from vmoe.data.sources import open_source
from vmoe.host.cores import cores
from vmoe.mesh import place
from vmoe.models import model_config
from vmoe.nn.mlp import Mlp
from vmoe.nn.moe import MoE
from vmoe.nn.patches import num_tokens

ROOT = Path(__file__).parents[2]
MODELS = {  # the config, and the images of a batch on one device
    "S/32": ("imagenet1k_s32_light", 1024),
    "B/16": ("imagenet21k_b16", 256),
    "L/16": ("jft_l16", 128),
}
E = 8  # experts of the layers


class Figure(NamedTuple):
    """A measurement: a median with its interquartile range, or a number without one."""

    what: str
    value: float
    unit: str
    iqr: float | None = None


Parts = Iterator[Figure | str]
"""Figures, and texts about what is skipped."""


class Sizes(NamedTuple):
    side: int = 16_384  # of the matrices of the large product
    copied: int = 1 << 29  # numbers of the large copy
    layer: tuple[int, int, int, int] = (64, 196, 768, 3072)  # images, tokens, width, hidden width
    attention: tuple[int, int, int, int] = (256, 197, 12, 64)  # images, tokens, heads, their width
    repeats: int = 9
    turns: int = 3  # with the input pipeline
    steps: int = 20  # in such a turn
    files: int = 256  # JPEG files, with ten names each
    tiny: bool = False


FULL, TINY = Sizes(), Sizes(64, 1 << 10, (4, 16, 16, 32), (2, 16, 2, 8), 1, 1, 2, 2, tiny=True)


def about_machine(function: str, tiny: bool) -> dict[str, str]:
    """The machine, on which the process has started JAX as a function needs it."""
    if function == "timm":
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # torch needs the memory
    if function == "devices" and tiny:
        jax.config.update("jax_num_cpu_devices", 2)
    driver = ""
    if tool := shutil.which("nvidia-smi"):
        query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.partition("\n")[0]
    platform = " ".join(jax.devices()[0].client.platform_version.split())
    about = {"devices": str(jax.device_count()), "platform": platform, "driver": driver or "none"}
    return machine() | about


def config_of(sizes: Sizes, name: str, dense: str = "") -> TrainConfig:
    """A config of the repository in bfloat16, with a batch for one device."""
    path, images = MODELS[name]
    config = load(ROOT / "configs" / f"{path}.py")
    if sizes.tiny:
        model = replace(model_config("vmoe_test_last2_e4"), depth=1, sparse_blocks=(0,))
        config, images = replace(config, model=model), 4
    changes = {"dtype": "bfloat16"} | ({"sparse_blocks": ()} if dense else {})
    rest = {"steps": ANY_LENGTH, "epochs": None, "images": None, "evaluations": (EvalConfig(),)}
    return replace(config, model=changes, batch_size=images, **rest)


def stored_runs(sizes: Sizes) -> Parts:
    """Our float32 results beside those of the V-MoE authors' code."""
    files = sorted((ROOT / "tests" / "golden").glob("*.npz"), key=lambda x: "indices" not in x.stem)
    for path in files[: 1 if sizes.tiny else None]:
        with jax.default_matmul_precision("highest"):
            run = Golden.opened(path)
            gradients, (logits, records, losses) = run.results
        ours = {"logits": logits} | {f"loss/{name}": loss for name, loss in losses.items()}
        differ = choices = 0
        for i, stored in run.blocks:
            ours[f"moe/encoderblock_{i}/router_logits"] = records[i].logits
            if "indices" in stored:
                routing = records[i].routing
                other = routing.experts != stored["indices"][..., 0]
                differ += int((other | (routing.kept != stored["kept"])).sum())
                choices += other.size
        outputs = [difference(each, run.float32(name)) for name, each in ours.items()]
        yield _worst(f"{path.stem}, outputs", outputs)
        theirs = run.below("f32/grad/") or run.below("grad/")
        of_gradients = [
            difference(gradients[name], each)
            for name, each in theirs.items()
            if not name.endswith("SelfAttention/key/bias")  # its true gradient is 0
        ]
        yield _worst(f"{path.stem}, gradients", of_gradients)
        if choices:
            yield Figure(f"{path.stem}, other choices", differ, f"of {choices:,}")


def _worst(what: str, differences: list[float]) -> Figure:
    return Figure(what, float(np.max(differences)), "difference / largest")  # NaN if one is


def ceilings(sizes: Sizes) -> Parts:
    x = jax.random.normal(jax.random.key(0), (sizes.side, sizes.side), jnp.bfloat16)
    y = jnp.ones(sizes.copied, jnp.float32)
    product, copy = compiled(jnp.matmul, x, x), compiled(jnp.negative, y)
    times = measured({"product": product.run, "copy": copy.run}, sizes.repeats)
    yield _rate("large bfloat16 product", times["product"], 2e-12 * sizes.side**3, "TFLOP/s")
    yield _rate("large copy", times["copy"], 2e-9 * y.nbytes, "GB/s")


def _rate(what: str, time: tuple[float, float], amount: float, unit: str) -> Figure:
    """An amount per second; its interquartile range is that of the time, to first order."""
    ms, iqr = time
    value = 1e3 * amount / ms
    return Figure(what, value, unit, value * iqr / ms)


def model(sizes: Sizes, *name: str) -> Parts:
    """Inference and the trainer's step, on a batch that is on the device."""
    config = config_of(sizes, *name)
    b, side = config.batch_size, config.model.image_size

    def forward() -> Program:
        images = jax.random.normal(jax.random.key(0), (b, side, side, 3))
        return forward_pass(config.model, images)

    programs = {
        "forward": (forward, flops.flops_to_logits(config.model)),
        "step": (lambda: training_step(config), flops.training_flops(config.model)),
    }
    for what, (make, work) in programs.items():
        program = make()
        yield from _speed(what, measured({what: program.run}, sizes.repeats)[what], b, work)
        yield Figure(f"{what}, XLA's temporary memory", program.temp_mb / 1e3, "GB")
        if stats := jax.devices()[0].memory_stats():  # a step needs more than the forward pass
            yield Figure(f"{what}, peak memory", stats["peak_bytes_in_use"] / 1e9, "GB")
        else:
            yield f"{what}: this device reports no peak memory"
        del program  # frees its arrays


def _speed(what: str, time: tuple[float, float], images: int, flops: float) -> Parts:
    yield _rate(f"{what}, {images} images", time, images, "images/s")
    yield _rate(what, time, 1e-12 * flops * images, "TFLOP/s")


def timm(sizes: Sizes, *name: str) -> Parts:
    """timm's dense model of the same shape, eager, with AdamW; bfloat16 by autocast."""
    if missing := [name for name in ("torch", "timm") if not find_spec(name)]:
        yield f"{' and '.join(missing)} not installed"
        return
    import torch
    from timm.models.vision_transformer import VisionTransformer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not sizes.tiny:
        yield "torch finds no GPU"
        return
    config = config_of(sizes, *name)
    b, vit = config.batch_size, config.model
    net = VisionTransformer(
        img_size=vit.image_size,
        patch_size=vit.patch_size,
        num_classes=vit.num_classes,
        embed_dim=vit.width,
        depth=vit.depth,
        num_heads=vit.num_heads,
        mlp_ratio=vit.mlp_dim / vit.width,
    ).to(device)
    images = torch.randn(b, 3, vit.image_size, vit.image_size, device=device)
    labels = torch.arange(b, device=device) % vit.num_classes
    optimizer = torch.optim.AdamW(net.parameters(), fused=device == "cuda")

    def forward() -> None:
        with torch.inference_mode(), torch.autocast(device, torch.bfloat16):
            net(images)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    def ended(run: Callable[[], None]) -> None:
        run()
        if device == "cuda":
            torch.cuda.synchronize()

    flops_of = flops.cost(vit).flops_per_image
    programs = {"forward": (forward, flops_of), "step": (step, 3 * flops_of)}
    for what, (run, work) in programs.items():
        times = measured({what: functools.partial(ended, run)}, sizes.repeats)
        yield from _speed(what, times[what], b, work)
        if device == "cuda":
            yield Figure(f"{what}, peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")


def layer(sizes: Sizes, name: Any, capacity: str) -> Parts:
    """An MoE layer beside a dense MLP on as many rows as there are choices."""
    b, n, d, f = sizes.layer
    tokens = jax.random.normal(jax.random.key(0), (b, n, d), jnp.bfloat16)

    def made(implementation: Any) -> MoE:
        router = TokenChoice(dropless=capacity == "dropless")
        config = MoEConfig(E, router=router, experts=MlpExpert(implementation=implementation))
        return MoE.from_config(config, d, f, n, rngs=nnx.Rngs(0))

    moe = made(name)
    if name == "auto":
        record = nnx.eval_shape(lambda moe, tokens: moe.forward(tokens)[1], moe, tokens)
        name = f"auto ({moe.implementation_for(record.routing)})"
    ours = of_module(moe, tokens)
    rows = jax.random.normal(jax.random.key(1), (moe.router.k * b * n, d), jnp.bfloat16)
    dense = of_module(Mlp(d, f, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), rows)
    for way in ours:
        times = measured({name: ours[way].run, "dense MLP": dense[way].run}, sizes.repeats)
        (ms, iqr), (dense_ms, _) = times.values()
        yield Figure(f"{name}, {way}", ms, "ms", iqr)
        yield Figure(f"{name}, {way}", ms / dense_ms, "x dense MLP")
        yield Figure(f"{name}, {way}, XLA's temporary memory", ours[way].temp_mb / 1e3, "GB")
    if name != "batched":
        both = ours["f+b"], of_module(made("batched"), tokens)["f+b"]
        gradients = zip(*(jax.tree.leaves(program.run()) for program in both), strict=True)
        yield _worst(f"{name}, gradients, from batched", [difference(*x) for x in gradients])


def attention(sizes: Sizes) -> Parts:
    """XLA's attention, which is the default, and cuDNN's."""
    b, n, heads, width = sizes.attention
    q, k, v = jax.random.normal(jax.random.key(0), (3, b, n, heads, width), jnp.bfloat16)
    outputs = []
    for name in ("xla", "cudnn"):
        if name == "cudnn" and (platform := jax.default_backend()) != "gpu":
            yield f"cuDNN's attention needs a GPU, this is a {platform}"
            return
        attend = functools.partial(jax.nn.dot_product_attention, implementation=name)
        programs = both_ways(attend, q, k, v)
        times = measured({way: each.run for way, each in programs.items()}, sizes.repeats)
        yield from (Figure(f"{name}, {way}", ms, "ms", iqr) for way, (ms, iqr) in times.items())
        outputs.append(programs["forward"].run())
    yield _worst("cudnn, forward, from xla", [difference(*outputs[::-1])])


def pipeline(sizes: Sizes, name: str) -> Parts:
    """Steps in a row on one batch on the device, and on batches of the config's input pipeline."""
    config = config_of(sizes, name)
    yield _of_steps("without it", training_step(config), config, sizes)
    readers, size = 1 if sizes.tiny else cores(), Preprocessing(config.model.image_size)
    ready, count = readers + AHEAD, sizes.steps * (sizes.turns + 1)
    with tempfile.TemporaryDirectory() as folder:
        write_jpegs(Path(folder), sizes.files)
        source = open_source(f"folder:{folder}", "train")
        batches = training_batches(source, config)
        with (
            start_workers(readers, source, config.batch_size, size) as workers,
            read_ahead(batches, 0, count + ready, workers) as reader,
        ):
            program = training_step(config, batches=(jax.device_put(x.batch) for x in reader))
            for _ in range(ready):  # read while the step was compiled
                program.run()
            yield _of_steps(f"with it, {readers} workers", program, config, sizes)


def _of_steps(what: str, program: Program, config: TrainConfig, sizes: Sizes) -> Figure:
    def run() -> Any:
        return [program.run() for _ in range(sizes.steps)]

    times = measured({what: run}, sizes.turns)
    return _rate(what, times[what], sizes.steps * config.batch_size, "images/s")


def devices(sizes: Sizes, name: str) -> Parts:
    """The step with the experts split over all devices, and an all-to-all alone."""
    count = jax.device_count()
    if count == 1:
        yield "there is one device"
        return
    config = config_of(sizes, name)
    config = replace(config, batch_size=config.batch_size * count)
    placement = place(config.model, jax.devices(), mesh=f"expert={count}")
    layers = list(config.model.moe_blocks.values())
    images = layers[0].router.images_per_group
    c = layers[0].slots(images * num_tokens(config.model))
    shape = (config.batch_size // images, layers[0].num_experts, c, config.model.width)
    slots = jax.device_put(jnp.ones(shape, jnp.bfloat16), placement.batch())
    step, transfer = training_step(config, placement), compiled(placement.to_experts, slots)
    times = measured({"step": step.run, "all-to-all": transfer.run}, sizes.repeats)
    of_device = flops.training_flops(config.model) * config.batch_size / count
    yield _rate("step", times["step"], config.batch_size, "images/s")
    yield _rate("step, each device", times["step"], 1e-12 * of_device, "TFLOP/s")
    sent = slots.nbytes / count * (count - 1) / count
    yield _rate("all-to-all of a layer", times["all-to-all"], 1e-9 * sent, "GB/s from each")
    share = 4 * len(layers) * times["all-to-all"][0] / times["step"][0]
    yield Figure("all-to-alls of a step, at most", share, "x step")
