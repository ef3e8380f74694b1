"""Fine-tunes on 500 and 1,500 drawings, as a stand-in for own photos: table in docs/your_images.md.

    python -m scripts.prepare.emoji data/emoji
    python -m scripts.experiments own_images           # trains what is missing; prints
    python -m scripts.experiments own_images --write   # also writes docs/your_images.md

The drawings are Twitter's emoji, in nine categories. 500 and 1,500 of the training split are used,
with the same share of each category. All drawings of validation (168) and test (189) are used.

The starts are random parameters (configs/emoji.py at 32 px), the packaged models of Fashion-MNIST,
and "words". This is a run of configs/emoji_pretrain.py, which was trained on the words of Google's
drawings of the same training emoji. It has seen no drawing by Twitter, and no emoji of validation
or test. ``recipe`` is the config of docs/your_images.md. The learning rate is the best on
validation with 500 drawings and seed 0. With it, each line of the table is trained with three
seeds.

The figures of a run are a line of scripts/experiments/rows/own_images.jsonl. A run with such a line
is neither trained nor measured again. The command can be stopped at any time and started again:
training resumes.
"""

import argparse
import csv
import hashlib
import io
import math
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import vmoe
from scripts.experiments.framework.pages import markdown_table, write_sections
from scripts.experiments.framework.runs import (
    ROOT,
    SEEDS,
    Comparison,
    Result,
    Rows,
    argument_parser,
    read_rows,
    versions,
)
from vmoe.config import (
    DataConfig,
    EvalConfig,
    OptimConfig,
    PreprocessingConfig,
    TrainConfig,
    load,
    replace,
)
from vmoe.workdir.layout import replace_text

PAGE = ROOT / "docs" / "your_images.md"
DRAWINGS = (500, 1_500)
CATEGORIES = 9
STARTS = {
    "words": "V-MoE, words of other drawings, 32 px",
    "vmoe_fashion_mnist": "`vmoe_fashion_mnist`, 28 px",
    "vit_fashion_mnist": "`vit_fashion_mnist`, 28 px",
}
RATES = {  # tried for each start, and for all parameters or the head alone
    ("words", "all"): (1e-4, 3e-4, 1e-3, 3e-3),
    ("words", "head"): (1e-3, 1e-2),
    ("vmoe_fashion_mnist", "all"): (3e-4, 1e-3, 3e-3),
    ("vit_fashion_mnist", "all"): (3e-4, 1e-3, 3e-3),
}
EPOCHS = 20
SCRATCH_STEPS = 1_000
SCRATCH_SIZE = 32
SHOTS = (5, 25)
HEAD_ALONE = tuple(
    each
    for group in ("others", "experts", "routers")
    for each in (f"--optim.lr-factors.{group}", 0)
)


class Cell(NamedTuple):
    """A start, a number of drawings and a way to train on them.

    Attributes:
        start: a key of ``STARTS``, or scratch.
        drawings: the number of training drawings.
        trained: all parameters, the head, or a probe of the features.
        rate: the learning rate, 0 for a probe.
        epochs: 0 for a probe, and from scratch.
    """

    start: str
    drawings: int
    trained: str
    rate: float = 0.0
    epochs: int = 0

    @property
    def name(self) -> str:
        parts = [self.start, self.drawings, self.trained]
        parts += [f"{self.rate:.0e}"] * bool(self.rate) + [self.epochs] * bool(self.epochs)
        return "-".join(map(str, parts))


def recipe(start: str, data: str, classes: int) -> TrainConfig:
    """The config of docs/your_images.md.

    Args:
        start: trained weights, in any form.
        data: as for ``--data.name``.
    """
    trunk = vmoe.load(start)
    return TrainConfig(
        model=replace(trunk.model.config, num_classes=classes),
        data=DataConfig(
            data,
            preprocessing=PreprocessingConfig(exif=trunk.preprocessing.exif, keep_aspect=True),
            crop_min_area=0.5,
            flip=True,
            mixup=0.2,
        ),
        optim=OptimConfig(lr=1e-3, warmup_steps=20, layer_decay=0.75),
        epochs=EPOCHS,
        batch_size=32,
        label_smoothing=0.1,
        evaluations=(EvalConfig(preprocessing=replace(trunk.preprocessing, keep_aspect=True)),),
        log_every=10,
        evaluate_every=20,
        checkpoint_every=20,
    )


def subset(data: Path, drawings: int, path: Path) -> None:
    """Writes a list of some training drawings, and of all for validation and test.

    Args:
        data: the folder that ``scripts.prepare.emoji`` wrote.
        drawings: the approximate number of training drawings, with the same share of each category.

    Raises:
        SystemExit: there is no list of Twitter's drawings.
    """
    if not (source := data / "twitter.csv").is_file():
        raise SystemExit(f"{source}: no such file; make it with python -m scripts.prepare.emoji")
    with source.open(newline="") as file:
        rows = list(csv.DictReader(file))
    training = defaultdict[str, list[dict[str, str]]](list)
    for row in rows:
        if row["split"] == "train":
            training[row["label"]].append(row)
    share = min(1.0, drawings / sum(map(len, training.values())))
    kept = [row for row in rows if row["split"] != "train"]
    for of in training.values():
        of.sort(key=lambda row: hashlib.sha256(row["path"].encode()).digest())
        kept += of[: max(1, round(share * len(of)))]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(row | {"path": str(data / row["path"])} for row in kept)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, text.getvalue())


class OwnImages(Comparison):
    """The cells, each with some seeds."""

    needs = "test"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.data: Path = options.data.absolute()
        self.words: Path = (options.words or self.workdir / "words").absolute()
        self.cells: dict[str, Cell] = {}

    def settings(self, model: str) -> Result:
        return self.cells[model]._asdict()

    def make(self, cells: Iterable[tuple[Cell, int]]) -> None:
        """Trains and measures the missing rows of cells, each with a seed."""
        wanted = list(dict.fromkeys(cells))
        self.cells |= {cell.name: cell for cell, _ in wanted}
        missing = [
            (cell.name, seed) for cell, seed in wanted if (cell.name, seed) not in self.stored
        ]
        if missing:
            for drawings in DRAWINGS:
                subset(self.data, drawings, self.list(drawings))
            if not (self.words / "config.json").exists():
                config = load(ROOT / "configs" / "emoji_pretrain.py")
                data = {"name": f"manifest:{self.data / Path(config.data.name).name}"}
                self.train(replace(config, data=data), self.words, 0)
        self.all(self.row, missing)

    def list(self, drawings: int) -> Path:
        return self.workdir / "lists" / f"{drawings}.csv"

    def measure(self, model: str, seed: int) -> Result:
        cell = self.cells[model]
        data = f"manifest:{self.list(cell.drawings)}"
        weights = str(self.words) if cell.start == "words" else cell.start
        if cell.trained == "probe":
            (accuracies,) = self.probed(weights, data, shots=SHOTS, seed=seed).values()
            return {"test": accuracies}
        workdir = self.workdir / f"{model}-{seed}"
        if cell.start == "scratch":
            changes = dict(data=dict(name=data), steps=SCRATCH_STEPS)
            config = load(ROOT / "configs" / "emoji.py")
            config = replace(config, model=dict(image_size=SCRATCH_SIZE), **changes)
            options: tuple[object, ...] = ()
        else:
            config = replace(
                recipe(weights, data, CATEGORIES), epochs=cell.epochs, optim=dict(lr=cell.rate)
            )
            options = ("--init", weights, *(HEAD_ALONE if cell.trained == "head" else ()))
        start = None if workdir.exists() else time.perf_counter()
        self.train(config, workdir, seed, *options)
        seconds = None if start is None else round(time.perf_counter() - start)
        with (workdir / "evaluations.csv").open(newline="") as file:
            validation = list(csv.DictReader(file))[-1]
        return {
            "steps": int(validation["step"]),
            "image_size": config.model.image_size,
            "validation": float(validation["accuracy"]),
            "cross_entropy": float(validation["cross_entropy"]),
            "test": self.correct(workdir, f"{data}:test"),
            "seconds": seconds,  # of training, unless it was stopped and resumed
            "versions": versions(workdir),
        }

    def correct(self, run: Path, data: str) -> str:
        """One digit for each image: whether its prediction is right."""
        path = run / "predictions.csv"
        self.vmoe("evaluate", "--checkpoint", run, "--data", data, "--predictions", path)
        with path.open(newline="") as file:
            return "".join(row["correct"] for row in csv.DictReader(file))


def searched(start: str, trained: str) -> list[Cell]:
    """The cells of which the learning rate is chosen."""
    return [Cell(start, DRAWINGS[0], trained, rate, EPOCHS) for rate in RATES[start, trained]]


def best_rate(rows: Rows, start: str, trained: str) -> float:
    """The learning rate with the best validation accuracy; of equal ones, with less loss."""

    def score(cell: Cell) -> tuple[float, float]:
        row = rows[cell.name][0]
        return row["validation"], -row["cross_entropy"]

    return max(searched(start, trained), key=score).rate


class Line(NamedTuple):
    """A line of the table.

    Attributes:
        cells: one for each number of drawings.
    """

    start: str
    trained: str
    cells: tuple[Cell, ...]


def scratch() -> Line:
    cells = tuple(Cell("scratch", number, "all") for number in DRAWINGS)
    return Line(f"random, {SCRATCH_SIZE} px", f"all, {SCRATCH_STEPS:,} steps of 64", cells)


def fine_tuned(rows: Rows) -> Iterator[Line]:
    """The lines of the table whose learning rate was chosen."""
    for start, trained in RATES:
        rate = best_rate(rows, start, trained)
        cells = tuple(Cell(start, number, trained, rate, EPOCHS) for number in DRAWINGS)
        yield Line(STARTS[start], f"{trained}, {rate:g}, {EPOCHS} epochs", cells)


def tables(rows: Rows) -> str:
    """What the rows show, as Markdown."""
    correct = {
        name: np.mean([[digit == "1" for digit in row["test"]] for row in of.values()], axis=0)
        for name, of in rows.items()
        if not name.endswith("probe")
    }
    columns = ["start", "trained, learning rate", *(f"{number:,} drawings" for number in DRAWINGS)]
    first = scratch()
    text = []
    for line in (first, *fine_tuned(rows)):
        shown = [line.start, line.trained]
        for cell, other in zip(line.cells, first.cells, strict=True):
            value = correct[cell.name]
            figure = f"{100 * value.mean():.1f} ± {_error(value):.1f}"
            if cell != other:
                difference = value - correct[other.name]
                figure += f" ({100 * difference.mean():+.1f} ± {_error(difference):.1f})"
            of = rows[cell.name].values()
            if seconds := [row["seconds"] for row in of if row["seconds"]]:
                figure += f", {np.mean(seconds) / 60:.0f} min"
            shown.append(figure)
        text.append(shown)
    probes = [
        [label, *(f"{100 * np.mean(of):.1f}" for of in zip(*shots, strict=True))]
        for start, label in STARTS.items()
        for shots in [
            [row["test"] for row in rows[Cell(start, DRAWINGS[1], "probe").name].values()]
        ]
    ]
    rates = sorted({rate for of in RATES.values() for rate in of})
    chosen = []
    for start, trained in RATES:
        values = {c.rate: rows[c.name][0]["validation"] for c in searched(start, trained)}
        shown = [f"{100 * values[rate]:.1f}" if rate in values else "" for rate in rates]
        chosen.append([STARTS[start], trained, *shown])
    return "\n\n".join(
        (
            markdown_table(columns, text),
            markdown_table(
                ["probe of", *(f"{number} drawings of each category" for number in SHOTS)], probes
            ),
            markdown_table(["validation", "trained", *(f"lr {rate:g}" for rate in rates)], chosen),
        )
    )


def _error(values: np.ndarray) -> float:
    """The standard error of a mean over images, in percent."""
    return 100 * float(values.std(ddof=1)) / math.sqrt(len(values))


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argument_parser("own_images", __doc__)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--words", type=Path, help="a finished run of configs/emoji_pretrain.py")
    help_ = "page with the tables to replace"
    parser.add_argument("--write", type=Path, nargs="?", const=PAGE, help=help_)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> None:
    options = options_of(arguments)
    experiments = OwnImages(options)
    first = [cell for start, trained in RATES for cell in searched(start, trained)]
    first[6:6] = [
        *scratch().cells,
        *(Cell(start, DRAWINGS[1], "probe") for start in STARTS),
    ]
    experiments.make((cell, 0) for cell in first)
    lines = (scratch(), *fine_tuned(read_rows(options.rows)))
    cells = [cell for line in lines for cell in line.cells]
    experiments.make((cell, seed) for seed in SEEDS for cell in cells)
    text = tables(read_rows(options.rows)) + "\n"
    print(text)
    if options.write:
        write_sections(options.write, {"own_images": text})
