"""Classic methods on a data set: fitted on its training split, measured on its test split.

    python -m scripts.experiments baselines [--data digits] [--write FILE]
    python -m scripts.experiments baselines --data fashion_mnist     # eleven minutes on 2 cores

Each method uses the settings that are best on the validation split; randomized methods are fitted
with seeds 0, 1, 2. ``--write`` saves an image of the test split for ``vmoe predict``.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.base import ClassifierMixin
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from vmoe.data.sources import open_source

Factory = Callable[[int], ClassifierMixin]  # a classifier from a seed


def mlp(width: int) -> Factory:
    return lambda seed: MLPClassifier((width,), early_stopping=True, random_state=seed)


def trees(rounds: int) -> Factory:
    return lambda seed: HistGradientBoostingClassifier(
        max_iter=rounds, early_stopping=False, max_features=0.2, random_state=seed
    )


METHODS: dict[str, dict[str, dict[str, Factory]]] = {
    "digits": {
        "logistic regression": {
            f"C={c}": lambda seed, c=c: make_pipeline(
                StandardScaler(), LogisticRegression(C=c, max_iter=1000)
            )
            for c in (0.01, 0.1, 1)
        },
        "k-NN": {f"k={k}": lambda seed, k=k: KNeighborsClassifier(k) for k in (1, 3, 5)},
        "RBF-SVM": {
            f"C={c}, gamma={gamma}": lambda seed, c=c, gamma=gamma: SVC(C=c, gamma=gamma)
            for c in (1, 10)
            for gamma in (0.2, 0.5, 1)
        },
    },
    "fashion_mnist": {
        "MLP": {f"{width} hidden": mlp(width) for width in (128, 512)},
        "gradient-boosted trees": {f"{rounds} rounds": trees(rounds) for rounds in (30, 100)},
    },
}
RANDOMIZED = ("MLP", "gradient-boosted trees")


def pixels(source: Any) -> np.ndarray:
    """One row per image of a source of arrays: its gray values in [0, 1]."""
    return (source.images[..., 0].reshape(len(source), -1) / 255).astype(np.float32)


def measure(name: str, factories: dict[str, Factory], splits: dict[str, Any]) -> tuple[str, ...]:
    """A table row: the method, its best settings, validation and test accuracy, seconds."""
    rows = {split: pixels(source) for split, source in splits.items()}
    start = time.perf_counter()

    def fit(key: str, seed: int) -> ClassifierMixin:
        print(f"fitting: {name}, {key}, seed {seed}", file=sys.stderr, flush=True)
        return factories[key](seed).fit(rows["train"], splits["train"].labels)

    def score(model: ClassifierMixin, split: str) -> float:
        return model.score(rows[split], splits[split].labels)

    fitted = {key: fit(key, 0) for key in factories}
    scores = {key: score(model, "validation") for key, model in fitted.items()}
    best = max(scores, key=scores.__getitem__)
    models = [fitted[best], *(fit(best, seed) for seed in (1, 2) if name in RANDOMIZED)]
    tests = [score(model, "test") for model in models]
    shown = ", ".join(f"{test:.2%}" for test in tests)
    mean = f" (mean {np.mean(tests):.2%})" if len(tests) > 1 else ""
    seconds = time.perf_counter() - start
    return name, best, f"{scores[best]:.2%}", shown + mean, f"{seconds:,.0f} s"


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        "python -m scripts.experiments baselines", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data", default="digits", help="digits, fashion_mnist[:FOLDER]")
    parser.add_argument("--write", help="PNG file to write, with one image of the test split")
    options = parser.parse_args(arguments)
    splits: dict[str, Any] = {
        split: open_source(options.data, split) for split in ("train", "validation", "test")
    }
    table = Table(
        *(
            "method",
            "settings",
            "validation",
            f"{options.data.partition(':')[0]}:test",
            "time of all fits",
        ),
        title="classic methods",
    )
    for name, factories in METHODS[options.data.partition(":")[0]].items():
        table.add_row(*measure(name, factories, splits))
    Console().print(table)
    if options.write:
        test = splits["test"]
        Image.fromarray(np.ascontiguousarray(test.images[0])).save(options.write)
        print(
            f"{options.write}: an image of the test split, class {test.class_names[test.labels[0]]}"
        )
