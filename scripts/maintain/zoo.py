"""Writes the trained models that come with the package, their model cards, and samples of images.

    python -m scripts.experiments upcycle_and_prune         # trains the models of Fashion-MNIST
    python -m scripts.prepare.emoji data/emoji
    for seed in 0 1 2; do
      vmoe train --config emoji --workdir runs/emoji-$seed --seed $seed
    done
    python -m scripts.maintain.zoo                     # weights, samples, measurements, cards
    python -m scripts.maintain.zoo --keep weights      # measures the packaged weights: cards
    python -m scripts.maintain.zoo --keep measurements # writes the cards from measured.json

For each model it takes the seed with the best accuracy on the validation split after the last step.
It measures the packaged model with ``vmoe evaluate`` and ``vmoe routing`` and writes the figures to
``measured.json`` next to the weights. The card is written from these and from the texts below.
"""

import argparse
import csv
import datetime
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from scripts.prepare.emoji import emoji_of
from vmoe import zoo
from vmoe.analysis.statistics import standard_error
from vmoe.checkpoints import read, vmoe_format
from vmoe.checkpoints.card import Facts, card
from vmoe.checkpoints.stored import Origin
from vmoe.data.decode import decode
from vmoe.data.sources import Example, open_source
from vmoe.data.sources.builtin import path_of
from vmoe.evaluate import evaluate
from vmoe.factory import load
from vmoe.host.signals import temporary_folder
from vmoe.studies.routing.command import FEW
from vmoe.trees import by_name

SEEDS = (0, 1, 2)
PREDICTED = 4  # images whose logits are stored
FASHION_MNIST = """\
Fashion-MNIST ([arXiv 1708.07747](https://arxiv.org/abs/1708.07747)): gray pictures of Zalando's
products, 28 x 28 pixels, ten kinds of clothing. 55,000 of its 60,000 training images were used for
training, the other 5,000 are the validation split. License: MIT, (c) 2017 Zalando SE."""
EMOJI = """\
Drawings of emoji by two vendors, 64 x 64 pixels on white, in nine categories of Unicode: 3,080
training images. `scripts/prepare/emoji.py` makes them from Noto Color Emoji ((c) Google, Apache
License 2.0) and Twemoji ((c) Twitter, Inc and other contributors, CC-BY 4.0). Both drawings of an
emoji are in the same split. The data are not on the Hugging Face hub."""
TRAINING = """

`{config}` was trained with the seeds 0, 1 and 2. This is the seed with
the best accuracy on the validation split."""
ACCURACY = """\
In percent, with the standard error over the {observed} of the split. It does not cover the spread
between seeds. The validation split chose the seed, so its accuracy is optimistic.

| data | images | accuracy |
|---|---|---|
{rows}

The first command repeats the last row, the second one all rows ({machine},
{date}, jax {jax}):
```
vmoe evaluate --checkpoint {name} --data {sample}
python -m scripts.maintain.zoo {name} --keep weights
```"""
DEPENDENT = """\
- {changed:.1%} of the predictions on {images} images of `{sample}` depend on the other
  images of the batch: they are not the same in all of {orders} orders of the images. The command
  above with `--data {sample}` repeats this, in batches of {batch_size} images."""
FASHION_LIMITS = """\
- The training data are small, 55,000 images from one source. Other pictures of clothing, such as
  photographs with color or background, were not tested.
- This is a small example for trying vmoe. It does not reproduce a result of the V-MoE paper, and it
  is not meant for real use."""
EMOJI_LIMITS = """\
- The training data are very small, 3,080 images, and {wrong:.0%} of the test images are classified
  wrongly. Photographs and drawings in other styles were not tested.
- A few test emoji look exactly like a training emoji with another name.
- This is a small example for trying vmoe. It does not reproduce a result of the V-MoE paper, and it
  is not meant for real use."""
LICENSE = "Apache 2.0, like vmoe. The training data have their own license: see Training data."
METADATA = """\
license: apache-2.0
{datasets}metrics: [accuracy]
model-index:
- name: {name}
  results:
  - task: {{type: image-classification}}
    dataset: {{name: {title}, type: {hub}, split: test}}
    metrics: [{{type: accuracy, value: {accuracy:.2f}}}]
"""


class Data(NamedTuple):
    """A data set.

    Attributes:
        name: for ``open_source``.
        title: name for people.
        hub: name on the Hugging Face hub, or a name of its own if it is not there.
        on_hub: whether it is there.
        sample: packaged sample of its test images, and their number.
        training: text of the card on the training data.
        limits: text of the card on the limits of a model; ``wrong`` is its error on the test split.
        observed: what is independent of each other in a split.
    """

    name: str
    title: str
    hub: str
    on_hub: bool
    sample: tuple[str, int]
    training: str
    limits: str
    observed: str = "images"

    @property
    def splits(self) -> tuple[str, ...]:
        """Splits to measure: validation, test, and the sample."""
        return f"{self.name}:validation", f"{self.name}:test", f"{self.sample[0]}:test"


class Model(NamedTuple):
    """A model to write.

    Attributes:
        runs: path of the run folders, without their seeds.
        config: config of the runs.
        data: key of ``DATA``.
    """

    runs: str
    config: str
    data: str


DATA = {
    "fashion_mnist": Data(
        "fashion_mnist",
        "Fashion-MNIST",
        "zalando-datasets/fashion_mnist",
        True,
        ("fashion_mnist_sample", 512),
        FASHION_MNIST,
        FASHION_LIMITS,
    ),
    "emoji": Data(
        "folder:data/emoji",
        "emoji",
        "emoji",
        False,
        ("emoji_sample", 128),
        EMOJI,
        EMOJI_LIMITS,
        "emoji",  # whose two drawings are alike
    ),
}
FASHION_RUNS = "runs/upcycle_and_prune"
MODELS = {
    "vmoe_fashion_mnist": Model(
        f"{FASHION_RUNS}/sparse", "configs/fashion_mnist.py", "fashion_mnist"
    ),
    "vit_fashion_mnist": Model(
        f"{FASHION_RUNS}/dense", "configs/fashion_mnist_dense.py", "fashion_mnist"
    ),
    "vmoe_emoji": Model("runs/emoji", "configs/emoji.py", "emoji"),
}


def write_sample(data: Data, place: str) -> None:
    """Writes some test images: the first ones, or random ones of a folder, which is sorted."""
    examples = sample_of(data, place)
    pixels = np.stack([decode(each.image, each.origin) for each in examples])
    gray = (pixels == pixels[..., :1]).all()
    names = emoji_of(example.origin for example in examples)
    _, groups = np.unique(names, return_inverse=True)
    arrays = {
        "images": pixels[..., 0] if gray else pixels,
        "labels": np.array([each.labels[0] for each in examples], np.uint8),
        "class_names": np.array(open_source(place, "test").class_names),
    }
    if len(set(groups)) < len(groups):
        arrays["groups"] = groups
    np.savez_compressed(path_of(data.sample[0]), **arrays)


def sample_of(data: Data, place: str) -> list[Example]:
    """The test images of the packaged sample."""
    test = open_source(place, "test")
    order = np.arange(len(test))
    if data.name.startswith("folder:"):
        order = np.random.default_rng(0).permutation(order)
    return [test[i] for i in order[: data.sample[1]].tolist()]


def write_weights(name: str, place: str) -> None:
    """Writes the run of a model that is the best one on the validation split."""
    stored = [read(f"{MODELS[name].runs}-{seed}") for seed in SEEDS]
    validation = open_source(place, "validation")
    accuracies = [evaluate(each.model(), validation).accuracy for each in stored]
    print(f"{name}: validation accuracies {accuracies}")
    folder = zoo.PACKAGED / name
    shutil.rmtree(folder, ignore_errors=True)
    vmoe_format.write(folder, stored[int(np.argmax(accuracies))])


def measure(name: str, place: str) -> dict[str, Any]:
    """Measures a packaged model, and writes the figures next to it.

    Args:
        place: name of the data set on this machine.
    """
    folder, data = zoo.PACKAGED / name, DATA[MODELS[name].data]
    accuracies = {}
    for split in data.splits:
        own = split.replace(data.name, place, 1) if split.startswith(f"{data.name}:") else split
        with temporary_folder() as files:
            each = files / "predictions.csv"
            command = ("evaluate", "--checkpoint", folder, "--data", own, "--predictions", each)
            report = vmoe(*command, "--json")
            images, correct = read_predictions(each)
        if data.name.startswith("folder:") and split == data.splits[-1]:  # packaged without names
            images = [example.origin for example in sample_of(data, place)]
        error = standard_error(correct, np.array(emoji_of(images)))
        accuracies[split] = {key: report[key] for key in ("accuracy", "images")} | {"error": error}
    measured: dict[str, Any] = {
        "accuracies": accuracies,
        "dependence": None,
        "logits": logits_of(name),
        "machine": machine(),
        "date": str(datetime.date.today()),
        "jax": jax.__version__,
    }
    if read(folder).config.sparse_blocks:
        sample, count = data.sample
        report = vmoe("routing", "--checkpoint", folder, "--data", sample, "--json")
        dependence = {"images": min(count, FEW), "changed": report["changed_by_batch"]}
        measured["dependence"] = dependence | {"orders": 8, "batch_size": 64}
    (folder / zoo.MEASURED).write_text(json.dumps(measured, indent=2) + "\n")
    return measured


def logits_of(name: str) -> list[list[float]]:
    """What a packaged model computes for the first images of its sample, for ``vmoe check``."""
    loaded = load(zoo.PACKAGED / name)
    source = open_source(DATA[MODELS[name].data].sample[0], "test")
    images = loaded.preprocess([source[i].image for i in range(PREDICTED)])
    return np.asarray(loaded.model(images)).tolist()


def read_predictions(file: Path) -> tuple[list[str], np.ndarray]:
    """Where the images of ``vmoe evaluate --predictions`` are from, and which are correct."""
    with file.open(newline="") as text:
        rows = list(csv.DictReader(text))
    return [row["image"] for row in rows], np.array([row["correct"] == "1" for row in rows])


def vmoe(*arguments: str | Path) -> dict[str, Any]:
    """The JSON that a command prints."""
    command = [sys.executable, "-m", "vmoe", *map(str, arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def machine() -> str:
    """The name of the processor."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def card_of(name: str) -> str:
    """The card of a packaged model, from its files, its measurements and the texts above."""
    folder, data = zoo.PACKAGED / name, DATA[MODELS[name].data]
    measured = json.loads((folder / zoo.MEASURED).read_text())
    rows = [
        f"| `{split}` | {row['images']:,} | {100 * row['accuracy']:.2f} "
        f"± {100 * row['error']:.2f} |"
        for split, row in measured["accuracies"].items()
    ]
    accuracy = measured["accuracies"][f"{data.name}:test"]["accuracy"]
    limits = [data.limits.format(wrong=1 - accuracy)]
    names = {"name": name, "sample": data.sample[0], "observed": data.observed}
    if dependence := measured["dependence"]:
        limits.insert(0, DEPENDENT.format(**names, **dependence))
    facts = Facts(
        metadata=METADATA.format(
            name=name,
            datasets=f"datasets: [{data.hub}]\n" * data.on_hub,
            title=data.title,
            hub=data.hub,
            accuracy=100 * accuracy,
        ),
        training_data=data.training + TRAINING.format(config=MODELS[name].config),
        accuracy=ACCURACY.format(rows="\n".join(rows), **names, **measured),
        limits="\n".join(limits),
        license=LICENSE,
    )
    stored = read(folder)
    origin = json.loads((folder / vmoe_format.CONFIG).read_text())["origin"]
    before = Origin(origin["format"], origin["path"], origin["weights"])
    return card(name, stored._replace(origin=before), by_name(stored.params), facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *MODELS], metavar="NAME", default=[])
    parser.add_argument(
        "--keep",
        choices=("nothing", "weights", "measurements"),
        default="nothing",
        help="packaged files that are not written again; measurements: only cards are written",
    )
    for key, data in DATA.items():
        option = f"--{key.replace('_', '-')}"
        parser.add_argument(option, default=data.name, metavar="DATA", help="where the data are")
    options = parser.parse_args()
    for name in options.names or MODELS:
        key = MODELS[name].data
        place = getattr(options, key)
        if options.keep == "nothing":
            write_sample(DATA[key], place)
            write_weights(name, place)
        if options.keep != "measurements":
            measure(name, place)
        (zoo.PACKAGED / name / vmoe_format.CARD).write_text(card_of(name), encoding="utf-8")
        print(zoo.PACKAGED / name / vmoe_format.CARD)


if __name__ == "__main__":
    main()
