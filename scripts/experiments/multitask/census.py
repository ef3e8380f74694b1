"""Two pairs of tasks on Census-Income (Ma et al. 2018, section 6.3), models of equal size.

The paper's pairs: income above 50,000 and never married; at least a college degree and never
married. As in the paper, the first task of a pair is the main one: the settings are those with its
best validation AUC. A random half of the test file is the validation split, and the columns from
which targets are made are no inputs of either pair. Unlike the paper, all models have nearly as
many parameters as MMoE, six settings are tried instead of thousands, and there are ten seeds
instead of 400 runs.
"""

import bisect
import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from sklearn.metrics import roc_auc_score

from vmoe.multitask import MultiTaskClassifier
from vmoe.multitask.build import BodyConfig, new_model

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
SETTINGS = [
    {"learning_rate": rate, "weight_decay": decay}
    for rate in (3e-4, 1e-3, 3e-3)
    for decay in (0.0, 0.1)
]
COMMON: dict[str, Any] = {
    "n_experts": 8,
    "tower_units": (8,),
    "embedding_size": 8,
    "batch_size": 512,
}
OWN: dict[str, dict[str, Any]] = {
    "cgc": {"n_experts": 4, "n_task_experts": 2},
    "ple": {"n_experts": 2, "n_task_experts": 2},
}
EXPERT_UNITS = 16  # of MMoE; the other models get as many units as give as many parameters


class Size(NamedTuple):
    """Rows of each split (None for all), share of the training rows for the search, epochs,
    patience, and number of settings."""

    rows: int | None
    share: float
    epochs: int
    patience: int
    settings: int


SIZES = {"full": Size(None, 1 / 3, 30, 3, 6), "tiny": Size(2_000, 1 / 3, 1, 1, 2)}


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


def new(model: str, units: int, seed: int, size: Size, **settings: Any) -> MultiTaskClassifier:
    return MultiTaskClassifier(
        MODELS[model],
        **COMMON | OWN.get(model, {}) | settings,
        expert_units=(units,),
        max_epochs=size.epochs,
        patience=size.patience,
        random_state=seed,
    )


def fit(
    model: str, units: int, splits: dict[str, Split], seed: int, size: Size, **settings: Any
) -> list[MultiTaskClassifier]:
    """The trained models: one, or for single tasks one for each."""
    train, validation = splits["train"], splits["validation"]
    groups = [[name] for name in train.y] if model == "single_task" else [list(train.y)]

    def chosen(split: Split, names: list[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return split.x, {name: split.y[name] for name in names}

    return [
        new(model, units, seed, size, **settings, categorical=train.categorical).fit(
            *chosen(train, names), validation=chosen(validation, names)
        )
        for names in groups
    ]


def aucs(models: list[Any], split: Split) -> dict[str, float]:
    """The area under the ROC curve of each task."""
    return {
        name: float(roc_auc_score(split.y[name], probabilities[:, 1]))
        for model in models
        for name, probabilities in model.predict_proba(split.x).items()
    }


@functools.cache
def parameters(model: str, units: int, width: int, names: tuple[str, ...]) -> int:
    """The number of parameters of the bodies and towers of a model, without the categories'."""
    settings = COMMON | OWN.get(model, {})
    config = BodyConfig(
        tasks=1 if model == "single_task" else len(names),
        units=(units,),
        experts=settings["n_experts"],
        task_experts=settings.get("n_task_experts", 0),
        layers=2,
    )
    outputs = dict.fromkeys(names[: config.tasks], 1)
    made = nnx.eval_shape(
        lambda: new_model(
            MODELS[model], config, width, outputs, settings["tower_units"], rngs=nnx.Rngs(0)
        )
    )
    total = sum(x.size for x in jax.tree.leaves(nnx.state(made)))
    return total * len(names) // config.tasks


def units_of(model: str, split: Split) -> int:
    """The units with which a model has nearest to as many parameters as MMoE."""
    width = split.x.shape[1] + (COMMON["embedding_size"] - 1) * len(split.categorical)
    names = tuple(split.y)
    wanted = parameters("mmoe", EXPERT_UNITS, width, names)

    def more(units: int) -> int:
        return parameters(model, units, width, names) - wanted

    enough = bisect.bisect_left(range(1, 257), 0, key=more) + 1
    return min(enough, max(1, enough - 1), key=lambda units: abs(more(units)))


def search(folder: Path, pair: str, model: str, size: Size) -> dict[str, Any]:
    """The settings with the best validation AUC of the main task, on some rows with one seed."""
    splits = load(folder, pair, size)
    train = splits["train"]
    splits["train"] = train.some(np.arange(round(len(train.x) * size.share)))
    units, tried = units_of(model, train), []
    for settings in SETTINGS[: size.settings]:
        models = fit(model, units, splits, 0, size, **settings)
        found = aucs(models, splits["validation"])
        tried.append({**settings, "auc": found, "epochs": [each.n_epochs_ for each in models]})
    best = max(range(len(tried)), key=lambda i: tried[i]["auc"][pair])
    labels = {name: [*read(folder, name, PAIRS[pair]).y.values()] for name in ("train", "test")}
    return {
        "units": units,
        "tried": tried,
        "settings": SETTINGS[best],
        "correlation": {k: float(abs(np.corrcoef(y)[0, 1])) for k, y in labels.items()},
    }


def measure(
    folder: Path, pair: str, model: str, seed: int, size: Size, found: dict[str, Any]
) -> dict[str, Any]:
    """The AUC on the test rows of a model that is trained with a seed.

    Args:
        found: what ``search`` found.
    """
    splits = load(folder, pair, size)
    models = fit(model, found["units"], splits, seed, size, **found["settings"])
    return {
        "auc": aucs(models, splits["test"]),
        "epochs": [each.n_epochs_ for each in models],
        "settings": found["settings"],
        "parameters": sum(each.n_parameters_ for each in models),
    }
