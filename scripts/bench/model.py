"""Measure whole models and their dense counterparts."""

import argparse
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from scripts.bench.measure import Program, Row, compiled, rows_of, temp_mb
from vmoe import models
from vmoe.config import DataConfig, TrainConfig, ViTConfig, replace
from vmoe.data.pipeline import Batch
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.state import abstract_state, init_state
from vmoe.train.step import make_train_step


def model(options: argparse.Namespace) -> list[Row]:
    name, batch = options.model, options.batch
    sparse = models.model_config(name, dtype=options.dtype, remat=options.remat)
    dense = replace(sparse, sparse_blocks=())
    variants = {
        "dense, plain": replace(dense, full_last_block=True),
        "dense": dense,
        "sparse, plain": replace(sparse, full_last_block=True),
        "sparse": sparse,
    }
    side = sparse.image_size
    images = jax.random.normal(jax.random.key(0), (batch, side, side, 3))
    rows = []
    forward = {k: forward_pass(config, images) for k, config in variants.items()}
    plain = "dense, plain"
    targets = {"sparse": "<= 1.03", "sparse, plain": "<= 1.20"}
    case = {"model": name, "batch": batch, "dtype": options.dtype, "remat": options.remat}
    case["pass"] = "forward"
    others = [k for k in variants if k != plain]
    ratios = {k: [(plain, targets.get(k, ""))] for k in others}
    ratios["sparse"].append(("dense", ""))
    rows += rows_of("model", case, forward, options.repeats, ratios)
    del forward
    steps = {
        k: training_step(TrainConfig(model=config, data=DataConfig("digits"), batch_size=batch))
        for k, config in variants.items()
    }
    ratios = {k: [(plain, "<= 1.05" if k == "sparse" else "")] for k in others}
    ratios["sparse"].append(("dense", ""))
    case = case | {"pass": "training step"}
    rows += rows_of("model", case, steps, options.repeats, ratios)
    for k, target in {"sparse": "<= 1.10", "sparse, plain": ""}.items():
        temp = steps[k].temp_mb
        memory_ratio = temp / steps[plain].temp_mb
        rows.append(
            Row("model", case, f"memory: {k}", None, None, memory_ratio, plain, target, temp)
        )
    for k, program in steps.items():
        rows.append(Row("model", case, f"compiling: {k}", 1e3 * program.compile_s, 0.0))
    for deep_model in options.compile:
        case = {
            "model": deep_model,
            "blocks": models.model_config(deep_model).depth,
            "pass": "gradient",
        }
        rows.append(Row("model", case, "compiling", 1e3 * _compile_seconds(deep_model), 0.0))
    return rows


def forward_pass(config: ViTConfig, images: jax.Array) -> Program:
    params = nnx.to_pure_dict(nnx.state(models.build(config), nnx.Param))
    return compiled(lambda p, x: models.with_params(config, p).forward(x)[0], params, images)


def training_step(
    config: TrainConfig,
    placement: Placement = ONE_DEVICE,
    batches: Iterator[Batch] | None = None,
) -> Program:
    """The trainer's step; each call gets the state that the previous call returned.

    Args:
        batches: one for each call; if None, all get the same one, which is on the devices.
    """
    b, side = config.batch_size, config.model.image_size
    labels = np.arange(b, dtype=np.int32)[:, None] % config.model.num_classes
    batch = Batch(np.zeros((b, side, side, 3), np.uint8), labels, np.ones(b, bool))
    batch = placement.make_global_array(batch)
    batches = batches or itertools.repeat(batch)
    start = time.perf_counter()
    lowered = make_train_step(config, placement).lower(abstract_state(config, placement), batch)
    step = lowered.compile()
    seconds = time.perf_counter() - start
    state = [init_state(config, placement)]

    def run() -> Any:
        state[0], metrics = step(state[0], next(batches))
        return metrics

    return Program(run, temp_mb(step), seconds)


def _compile_seconds(name: str) -> float:
    """Seconds to compile the loss and gradient of a named model, from shapes alone."""
    config = models.model_config(name)

    def loss(params: dict, images: jax.Array) -> jax.Array:
        model = models.with_params(config, params)
        logits, records = model.forward(images, train=True, key=jax.random.key(0))
        return logits.sum() + sum(record.aux_loss for record in records.values())

    params = nnx.to_pure_dict(nnx.state(models.build_abstract(config), nnx.Param))
    side = config.image_size
    images = jax.ShapeDtypeStruct((8, side, side, 3), jnp.float32)
    start = time.perf_counter()
    jax.jit(jax.grad(loss)).lower(params, images).compile()
    return time.perf_counter() - start
