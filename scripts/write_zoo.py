"""Writes the trained models that come with the package, and a sample of test images.

    python scripts/upcycle_and_prune.py         # trains them
    python scripts/write_zoo.py [--runs runs/upcycle_and_prune]

Of each model the seed with the best accuracy on the validation split, after the last step, is
written to ``vmoe/zoo``; prints all accuracies, of which those of the best seed stand in
``vmoe/zoo/__init__.py`` too.
"""

import argparse
import shutil
from pathlib import Path

import numpy as np

from vmoe import zoo
from vmoe.checkpoints import folder, read
from vmoe.data.sources import fashion_mnist, open_source
from vmoe.evaluate import evaluate

SEEDS = (0, 1, 2)
SAMPLE = 512  # test images
NOTES = """Trained on the 55,000 training images of Fashion-MNIST (arXiv 1708.07747; MIT license, \
(c) 2017 Zalando SE) by `{config}`. Of the seeds 0, 1, 2 it is seed {seed}, the best one on the \
validation split. Accuracy in percent, evaluated with the capacity of training (`python \
scripts/write_zoo.py`):

| split | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
{rows}

The weights have the license of vmoe (Apache 2.0)."""
MODELS = {  # name -> its runs, their config
    "vmoe_fashion_mnist": ("sparse", "configs/fashion_mnist.py"),
    "vit_fashion_mnist": ("dense", "configs/fashion_mnist_dense.py"),
}
DATA = ("fashion_mnist:validation", "fashion_mnist:test", "fashion_mnist_sample:test")


def write_sample() -> None:
    """Writes the first images of the test split, as they are."""
    test = open_source("fashion_mnist", "test")
    np.savez_compressed(
        fashion_mnist.SAMPLE,
        images=test.images[:SAMPLE, :, :, 0],
        labels=test.labels[:SAMPLE].astype(np.uint8),
    )


def write_model(name: str, runs: Path) -> None:
    """Evaluates the runs of a model, and writes the best one."""
    run, config = MODELS[name]
    stored = [read(runs / f"{run}-{seed}") for seed in SEEDS]
    accuracies = {
        data: [
            100 * evaluate(each.model(), open_source(*data.split(":"))).accuracy for each in stored
        ]
        for data in DATA
    }
    best = int(np.argmax(accuracies[DATA[0]]))
    rows = [
        f"| {data} | {' | '.join(f'{value:.2f}' for value in values)} |"
        for data, values in accuracies.items()
    ]
    destination = zoo.PACKAGED / name
    shutil.rmtree(destination, ignore_errors=True)
    notes = NOTES.format(config=config, seed=best, rows="\n".join(rows))
    folder.write(destination, stored[best], notes=notes)
    print(f"{destination}: seed {best}", *rows, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/upcycle_and_prune"))
    runs = parser.parse_args().runs
    write_sample()
    for name in MODELS:
        write_model(name, runs)


if __name__ == "__main__":
    main()
