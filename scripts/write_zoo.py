"""Writes the trained models that come with the package, and samples of test images.

    python scripts/upcycle_and_prune.py         # trains those of Fashion-MNIST
    python scripts/prepare_emoji.py data/emoji
    for seed in 0 1 2; do
      vmoe train --config configs/emoji.py --workdir runs/emoji-$seed --seed $seed
    done
    python scripts/write_zoo.py [NAME ...]      # all models, or some

Of each model the seed with the best accuracy on the validation split, after the last step, is
written to ``vmoe/zoo``; prints all accuracies, of which those of the best seed stand in
``vmoe/zoo/__init__.py`` too.
"""

import argparse
import shutil
from typing import NamedTuple

import numpy as np

from vmoe import zoo
from vmoe.checkpoints import read, vmoe_format
from vmoe.data.decode import decode
from vmoe.data.sources import name_and_split, open_source
from vmoe.data.sources.builtin import path_of
from vmoe.evaluate import evaluate

SEEDS = (0, 1, 2)
FASHION_MNIST = """the 55,000 training images of Fashion-MNIST (arXiv 1708.07747; MIT license, \
(c) 2017 Zalando SE)"""
EMOJI = """the 3,080 training images that `scripts/prepare_emoji.py` makes of Noto Color Emoji \
((c) Google, Apache License 2.0) and Twemoji ((c) Twitter, Inc and other contributors, CC-BY 4.0)"""
NOTES = """Trained on {data} by `{config}`. Of the seeds 0, 1, 2 it is seed {seed}, the best one \
on the validation split. Accuracy in percent, evaluated with the capacity of training (`python \
scripts/write_zoo.py`):

| split | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
{rows}

The weights have the license of vmoe (Apache 2.0)."""


class Model(NamedTuple):
    """A model to write.

    Attributes:
        runs: the run folders, without their seeds.
        config: of the runs.
        data: the data set.
        sample: of its test images.
        described: the training data, for the card.
    """

    runs: str
    config: str
    data: str
    sample: str
    described: str

    @property
    def splits(self) -> tuple[str, ...]:
        return (f"{self.data}:validation", f"{self.data}:test", f"{self.sample}:test")


FASHION_RUNS = "runs/upcycle_and_prune"
FASHION = ("fashion_mnist", "fashion_mnist_sample", FASHION_MNIST)
MODELS = {
    "vmoe_fashion_mnist": Model(f"{FASHION_RUNS}/sparse", "configs/fashion_mnist.py", *FASHION),
    "vit_fashion_mnist": Model(f"{FASHION_RUNS}/dense", "configs/fashion_mnist_dense.py", *FASHION),
    "vmoe_emoji": Model(
        "runs/emoji", "configs/emoji.py", "folder:data/emoji", "emoji_sample", EMOJI
    ),
}
SAMPLED = {"fashion_mnist_sample": 512, "emoji_sample": 128}  # number of images


def write_sample(model: Model) -> None:
    """Writes some test images: the first ones, or random ones of a folder, which is sorted."""
    test, count = open_source(model.data, "test"), SAMPLED[model.sample]
    order = np.arange(len(test))
    if model.data.startswith("folder:"):
        order = np.random.default_rng(0).permutation(order)
    examples = [test[i] for i in order[:count].tolist()]
    pixels = np.stack([decode(each.image, each.origin) for each in examples])
    gray = (pixels == pixels[..., :1]).all()
    np.savez_compressed(
        path_of(model.sample),
        images=pixels[..., 0] if gray else pixels,
        labels=np.array([each.labels[0] for each in examples], np.uint8),
        class_names=np.array(test.class_names),
    )


def write_model(name: str, model: Model) -> None:
    """Evaluates the runs of a model, and writes the best one."""
    stored = [read(f"{model.runs}-{seed}") for seed in SEEDS]
    accuracies = {
        data: [
            100 * evaluate(each.model(), open_source(*name_and_split(data))).accuracy
            for each in stored
        ]
        for data in model.splits
    }
    best = int(np.argmax(accuracies[model.splits[0]]))
    rows = [
        f"| {data} | {' | '.join(f'{value:.2f}' for value in values)} |"
        for data, values in accuracies.items()
    ]
    destination = zoo.PACKAGED / name
    shutil.rmtree(destination, ignore_errors=True)
    notes = NOTES.format(data=model.described, config=model.config, seed=best, rows="\n".join(rows))
    vmoe_format.write(destination, stored[best], notes=notes)
    print(f"{destination}: seed {best}", *rows, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], metavar="NAME", default=[])
    for name in parser.parse_args().names or MODELS:
        write_sample(MODELS[name])
        write_model(name, MODELS[name])


if __name__ == "__main__":
    main()
