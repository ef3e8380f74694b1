"""Cuts a run down to a few steps that take about a minute on a laptop."""

import dataclasses
from typing import Any

from vmoe.config.model import ViTConfig
from vmoe.config.train import TrainConfig
from vmoe.fields import replace

STEPS = 2
BATCH_SIZE = 8  # at least
IMAGES_OF_DEVICE = 4  # at least: two parts of a batch have two images each, to be mixed
NUM_CLASSES = 100
NUM_EXPERTS = 4
IMAGES = 64


def dry_run(config: TrainConfig, devices: int = 1) -> TrainConfig:
    """The same run on synthetic images, with fewer steps and a smaller model.

    The model keeps its widths and its image size. It has one dense block, one sparse block if it
    has any, at most 4 experts, or one for each device, and at most 100 classes. The batch holds 8
    images, or 4 for each device, in two parts if gradients are accumulated.
    """
    model = cut_model(config.model, devices)
    batch_size = max(BATCH_SIZE, IMAGES_OF_DEVICE * devices)
    data = f"synthetic:{max(IMAGES, batch_size)}:{model.image_size}:{model.num_classes}"
    return replace(
        config,
        model=model,
        data=dict(name=data, check="headers", num_workers=min(config.data.num_workers or 0, 1)),
        optim=dict(warmup_steps=1, cooldown_steps=0),
        steps=STEPS,
        epochs=None,
        images=None,
        batch_size=batch_size,
        accumulate=min(config.accumulate, 2),
        evaluations=tuple(
            dataclasses.replace(each, data=f"{data}:validation", batch_size=batch_size)
            for each in config.evaluations
        ),
        fewshot=dict(data=()),
        log_every=1,
        evaluate_every=STEPS,
        checkpoint_every=STEPS,
    )


def cut_model(model: ViTConfig, devices: int = 1) -> ViTConfig:
    """A dense block and, if the model has any, its last sparse block.

    Its number of experts is a multiple of the devices, over which they may be split, if the model
    has as many.
    """
    classes = min(model.num_classes, NUM_CLASSES)
    if not model.sparse_blocks:
        return replace(model, depth=1, num_classes=classes)
    layer = model.moe_blocks[model.sparse_blocks[-1]]
    experts = min(layer.num_experts, -(-NUM_EXPERTS // devices) * devices)
    cut: dict[str, Any] = {"shares": layer.router.shares[:experts]}
    if layer.router.k > experts:
        cut |= {"k": experts, "target_k": experts}
    cut = {name: value for name, value in cut.items() if layer.router.has(name)}
    kinds = {} if layer.experts.alike else {"each": layer.experts.members[:experts]}
    hot = min(layer.exchange.hot_experts, experts)
    moe = replace(
        layer, num_experts=experts, router=cut, experts=kinds, exchange=dict(hot_experts=hot)
    )
    return replace(model, depth=2, sparse_blocks=(1,), moe=moe, num_classes=classes)
