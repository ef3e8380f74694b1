"""Two pairs of tasks on Census-Income (Ma et al. 2018, section 6.3), each model at its best shape.

The paper's pairs: income above 50,000 and never married; at least a college degree and never
married. As in the paper, the first task of a pair is the main one, a random half of the test file
is the validation split, and the columns from which targets are made are no inputs of either pair.

Every model is searched with the same budget: three shapes, in two sizes, with two rates, on a third
of the training rows with three seeds. The setting with the best mean validation AUC of the main
task then trains on all rows with ten other seeds. The paper tries thousands of settings and reports
the mean of 400 runs.

An average of the parameters is evaluated, whose validation AUC has no jumps, so that training ends
by its curve: when it has not risen for five epochs. The best epoch counts.
"""

import functools
import hashlib
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import roc_auc_score

from vmoe.multitask import MultiTaskClassifier

COLLEGE = (  # "Associate degree or higher": of the definitions tried, the one whose correlation
    # with never married is the paper's
    "Associates degree-academic program",
    "Associates degree-occup /vocational",
    "Bachelors degree(BA AB BS)",
    "Masters degree(MA MS MEng MEd MSW MBA)",
    "Prof school degree (MD DDS DVM LLB JD)",
    "Doctorate degree(PhD EdD)",
)
TARGETS = {
    "income": ("50000+.",),
    "education": COLLEGE,
    "marital status": ("Never married",),
}
"""By column: the values that are the positive class."""
PAIRS = {"income": ("income", "marital status"), "education": ("education", "marital status")}
PAPER = {
    "income": {
        "single_task": (0.9337, 0.9922, 0.9398),
        "shared_bottom": (0.9295, 0.9921, 0.9361),
        "cross_stitch": (0.9361, 0.9922, 0.9406),
        "one_gate": (0.9319, 0.9923, 0.9387),
        "mmoe": (0.9359, 0.9927, 0.9410),
    },
    "education": {
        "single_task": (0.8792, 0.9922, 0.8843),
        "shared_bottom": (0.8813, 0.9917, 0.8836),
        "cross_stitch": (0.8819, 0.9921, 0.8855),
        "one_gate": (0.8813, 0.9912, 0.8852),
        "mmoe": (0.8826, 0.9924, 0.8860),
    },
}
"""By pair and model, of 400 runs: the mean AUC of both tasks, and the best of the first. The paper
also has the AUC of the second task in the run that is best at the first."""
MODELS = {
    "single_task": "shared_bottom",
    "shared_bottom": "shared_bottom",
    "one_gate": "one_gate",
    "mmoe": "mmoe",
    "cross_stitch": "cross_stitch",
    "cgc": "cgc",
    "ple": "ple",
}


class Shape(NamedTuple):
    """What a network or an expert is made of.

    Attributes:
        units: of its layers.
        experts: that tasks share; in PLE, of each of its two levels.
        task_experts: of each task, in CGC and PLE.
    """

    units: tuple[int, ...]
    experts: int = 1
    task_experts: int = 1


def shapes(*units: tuple[int, ...]) -> list[Shape]:
    return [Shape(each) for each in units]


SHAPES = {
    "single_task": shapes((70,), (281,), (64, 32), (205, 102), (62, 31, 15), (195, 97, 48)),
    "shared_bottom": shapes((136,), (546,), (115, 57), (341, 170), (112, 56, 28), (322, 161, 80)),
    "one_gate": [
        *(Shape((17,), 8), Shape((71,), 8), Shape((69,), 2), Shape((280,), 2)),
        *(Shape((33, 16), 4), Shape((117, 58), 4)),
    ],
    "mmoe": [
        *(Shape((16,), 8), Shape((70,), 8), Shape((68,), 2), Shape((279,), 2)),
        *(Shape((32, 16), 4), Shape((116, 58), 4)),
    ],
    "cross_stitch": shapes((70,), (281,), (64, 32), (205, 102), (62, 31, 15), (195, 97, 48)),
    "cgc": [
        *(Shape((16,), 4, 2), Shape((70,), 4, 2), Shape((46,)), Shape((188,))),
        *(Shape((32, 16), 2, 1), Shape((116, 58), 2, 1)),
    ],
    "ple": [
        *(Shape((20,), 2, 2), Shape((72,), 2, 2), Shape((39,)), Shape((126,))),
        *(Shape((37, 18), 1, 1), Shape((114, 57), 1, 1)),
    ],
}
"""Three of each model, in two sizes: as nearly as possible as many parameters as MMoE with eight
experts of 16 units, and four times as many, without those of the categories."""
RATES = (1e-3, 3e-3)
COMMON: dict[str, Any] = {
    "tower_units": (8,),
    "embedding_size": 8,
    "batch_size": 512,
    "weight_decay": 0.1,
    "ema_decay": 0.999,
}
FIRST = 10  # the first seed of the search, after those that are measured
SEARCHED = 3  # seeds of the search
BLOCKS = 20  # of the test rows, each of which is left out once: what other rows would change


class Size(NamedTuple):
    """Rows of each split (None for all), share of the training rows for the search, epochs,
    patience, and number of settings."""

    rows: int | None
    share: float
    epochs: int
    patience: int
    settings: int


SIZES = {"full": Size(None, 1 / 3, 60, 5, 12), "tiny": Size(2_000, 1 / 3, 1, 1, 2)}


class Setting(NamedTuple):
    """What is searched."""

    shape: Shape
    rate: float


def settings_of(model: str) -> list[Setting]:
    """As many for each model."""
    return [Setting(*each) for each in itertools.product(SHAPES[model], RATES)]


class Split(NamedTuple):
    """Rows: numbers and then codes of categories; targets by task; the categorical columns."""

    x: np.ndarray
    y: dict[str, np.ndarray]
    categorical: list[int]

    def some(self, rows: np.ndarray) -> "Split":
        """Some of the rows."""
        return self._replace(x=self.x[rows], y={k: v[rows] for k, v in self.y.items()})


def load(folder: Path, pair: str, size: Size) -> dict[str, Split]:
    """The people by split: "train", and the halves of the test file, "validation" and "test".

    Raises:
        SystemExit: the folder is missing.
    """
    train, both = read(folder, "train", PAIRS[pair]), read(folder, "test", PAIRS[pair])
    order = np.random.default_rng(0).permutation(len(both.x))
    validation, test = np.split(order, [len(order) // 2])
    rows = np.random.default_rng(1).permutation(len(train.x))
    return {
        "train": train.some(rows[: size.rows]),
        "validation": both.some(validation[: size.rows]),
        "test": both.some(test[: size.rows]),
    }


@functools.cache
def read(folder: Path, name: str, tasks: tuple[str, ...]) -> Split:
    """The people of a file."""
    categories, columns = columns_of(folder, name)
    y = {
        task: np.isin(columns[task], [categories[task].index(value) for value in TARGETS[task]])
        for task in tasks
    }
    inputs = [column for column in columns if column not in TARGETS]
    inputs.sort(key=lambda column: column in categories)  # numbers first
    x = np.stack([columns[column] for column in inputs], axis=1).astype(np.float32)
    categorical = [i for i, column in enumerate(inputs) if column in categories]
    return Split(x, {task: positive.astype(int) for task, positive in y.items()}, categorical)


@functools.cache
def columns_of(folder: Path, name: str) -> tuple[dict[str, list[str]], dict[str, np.ndarray]]:
    """The categories by column, and the columns of a file.

    Raises:
        SystemExit: a file is missing.
    """
    try:
        categories = json.loads((folder / "categories.json").read_text())
        with np.load(folder / f"{name}.npz") as file:
            return categories, {column: file[column] for column in file}
    except OSError as error:
        raise SystemExit(f"{error}: run python -m scripts.prepare.census") from None


@functools.cache
def checksum(folder: Path, name: str) -> str:
    """The SHA-256 of the names and values of a file's columns, and of all categories."""
    categories, columns = columns_of(folder, name)
    digest = hashlib.sha256(json.dumps(categories, sort_keys=True).encode())
    for column, values in sorted(columns.items()):
        digest.update(column.encode() + values.tobytes())
    return digest.hexdigest()


def fit(
    model: str, setting: Setting, splits: dict[str, Split], seed: int, size: Size
) -> list[MultiTaskClassifier]:
    """The trained models: one, or for single tasks one for each."""
    train, validation = splits["train"], splits["validation"]
    groups = [[name] for name in train.y] if model == "single_task" else [list(train.y)]
    shape = setting.shape

    def chosen(split: Split, names: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return split.x, {name: split.y[name] for name in names}

    return [
        MultiTaskClassifier(
            MODELS[model],
            **COMMON,
            n_experts=shape.experts,
            n_task_experts=shape.task_experts,
            expert_units=shape.units,
            learning_rate=setting.rate,
            categorical=train.categorical,
            scoring=dict.fromkeys(names, "roc_auc"),
            monitor=(names[0], "roc_auc"),
            max_epochs=size.epochs,
            patience=size.patience,
            random_state=seed,
        ).fit(*chosen(train, names), validation=chosen(validation, names))
        for names in groups
    ]


def probabilities(models: list[Any], split: Split) -> dict[str, np.ndarray]:
    """That of the positive class (b,), by task."""
    return {
        name: each[:, 1] for model in models for name, each in model.predict_proba(split.x).items()
    }


def aucs(found: dict[str, np.ndarray], split: Split) -> dict[str, float]:
    """The area under the ROC curve of each task, of its probabilities."""
    return {name: float(roc_auc_score(split.y[name], each)) for name, each in found.items()}


def without(positive: np.ndarray, probability: np.ndarray) -> list[float]:
    """The AUC without each of the ``BLOCKS`` of the rows, see ``pseudo_values``."""
    block = np.arange(len(positive)) % BLOCKS
    return [
        round(float(roc_auc_score(positive[block != i], probability[block != i])), 7)
        for i in range(BLOCKS)
    ]


def search(folder: Path, pair: str, model: str, seed: int, size: Size) -> dict[str, Any]:
    """The validation AUCs of each setting on some rows, with a seed."""
    splits = load(folder, pair, size)
    train, validation = splits["train"], splits["validation"]
    splits["train"] = train.some(np.arange(round(len(train.x) * size.share)))
    tried = []
    for setting in settings_of(model)[: size.settings]:
        models = fit(model, setting, splits, FIRST + seed, size)
        found = probabilities(models, validation)
        tried.append(
            {"auc": aucs(found, validation), "epochs": [each.n_epochs_ for each in models]}
        )
    labels = {name: [*read(folder, name, PAIRS[pair]).y.values()] for name in ("train", "test")}
    return {
        "tried": tried,
        "correlation": {k: float(abs(np.corrcoef(y)[0, 1])) for k, y in labels.items()},
    }


def best(pair: str, searched: Sequence[dict[str, Any]]) -> int:
    """The number of the setting with the highest mean validation AUC of the main task."""
    aucs = np.array([[each["auc"][pair] for each in found["tried"]] for found in searched])
    return int(aucs.mean(axis=0).argmax())


def measure(
    folder: Path, pair: str, model: str, seed: int, size: Size, setting: int
) -> dict[str, Any]:
    """The AUC on the test rows of a model that is trained with a seed.

    Args:
        setting: the number of that of ``settings_of``.
    """
    splits = load(folder, pair, size)
    test = splits["test"]
    models = fit(model, settings_of(model)[setting], splits, seed, size)
    found = probabilities(models, test)
    return {
        "auc": aucs(found, test),
        "without": {name: without(test.y[name], each) for name, each in found.items()},
        "curves": [
            {name: [round(row["scores"][name], 5) for row in each.history_] for name in each.tasks_}
            for each in models
        ],
        "epochs": [each.n_epochs_ for each in models],
        "setting": setting,
        "parameters": sum(each.n_parameters_ for each in models),
    }
