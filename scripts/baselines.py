"""Classic methods on a data set: fitted on its training split, measured on its test split.

    python scripts/baselines.py [--data digits] [--write FILE]
    python scripts/baselines.py --data fashion_mnist          # eleven minutes on 2 cores

Settings were chosen on the validation split, as the models' were; a method that draws at random is
fitted with seeds 0, 1, 2. ``--write`` saves one image of the test split, to predict.
"""

import argparse
import sys
import time
from collections.abc import Callable

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

from vmoe.data.sources import Source, open_source

Make = Callable[[int], ClassifierMixin]  # a classifier from a seed


def mlp(width: int) -> Make:
    return lambda seed: MLPClassifier((width,), early_stopping=True, random_state=seed)


def trees(rounds: int) -> Make:
    return lambda seed: HistGradientBoostingClassifier(
        max_iter=rounds, early_stopping=False, max_features=0.2, random_state=seed
    )


METHODS: dict[str, dict[str, dict[str, Make]]] = {
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
DRAWN = ("MLP", "gradient-boosted trees")


def pixels(source: Source) -> np.ndarray:
    """One row per image: its grey values in [0, 1]."""
    return (source.images[..., 0].reshape(len(source), -1) / 255).astype(np.float32)


def measure(name: str, makes: dict[str, Make], parts: dict[str, Source]) -> tuple[str, ...]:
    """A row: the method, the settings that won, accuracy on validation and test, seconds."""
    rows = {split: pixels(source) for split, source in parts.items()}
    start = time.perf_counter()

    def fit(key: str, seed: int) -> ClassifierMixin:
        print(f"fitting: {name}, {key}, seed {seed}", file=sys.stderr, flush=True)
        return makes[key](seed).fit(rows["train"], parts["train"].labels)

    def score(model: ClassifierMixin, split: str) -> float:
        return model.score(rows[split], parts[split].labels)

    fitted = {key: fit(key, 0) for key in makes}
    scores = {key: score(model, "validation") for key, model in fitted.items()}
    best = max(scores, key=scores.__getitem__)
    models = [fitted[best], *(fit(best, seed) for seed in (1, 2) if name in DRAWN)]
    tests = [score(model, "test") for model in models]
    shown = ", ".join(f"{test:.2%}" for test in tests)
    mean = f" (mean {np.mean(tests):.2%})" if len(tests) > 1 else ""
    seconds = time.perf_counter() - start
    return name, best, f"{scores[best]:.2%}", shown + mean, f"{seconds:,.0f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="digits, fashion_mnist[:FOLDER]")
    parser.add_argument("--write", help="where to save one image of the test split, a PNG")
    given = parser.parse_args()
    parts = {split: open_source(given.data, split) for split in ("train", "validation", "test")}
    table = Table(
        *("method", "settings", "validation", f"{given.data.partition(':')[0]}:test", "all fits"),
        title="classic methods",
    )
    for name, makes in METHODS[given.data.partition(":")[0]].items():
        table.add_row(*measure(name, makes, parts))
    Console().print(table)
    if given.write:
        test = parts["test"]
        Image.fromarray(np.ascontiguousarray(test.images[0])).save(given.write)
        print(f"{given.write}: an image of the test split, a {test.class_names[test.labels[0]]}")


if __name__ == "__main__":
    main()
