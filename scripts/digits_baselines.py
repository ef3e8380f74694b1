"""Classic methods on the digits: fitted on the training part, measured on the test part.

    python scripts/digits_baselines.py [--write FILE]

``--write`` saves one image of the test part, to predict. Their settings were chosen on the
validation part, as the models' were.
"""

import argparse
from collections.abc import Iterator

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table
from sklearn.base import ClassifierMixin
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC

from vmoe.data.sources import Source, open_source

METHODS: dict[str, dict[str, ClassifierMixin]] = {
    "logistic regression": {
        f"C={c}": make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000))
        for c in (0.01, 0.1, 1)
    },
    "k-NN": {f"k={k}": KNeighborsClassifier(k) for k in (1, 3, 5)},
    "RBF-SVM": {
        f"C={c}, gamma={gamma}": SVC(C=c, gamma=gamma) for c in (1, 10) for gamma in (0.2, 0.5, 1)
    },
}


def pixels(source: Source) -> np.ndarray:
    """One row per image: its grey values in [0, 1]."""
    return source.images[..., 0].reshape(len(source), -1) / 255


def baselines() -> Iterator[tuple[str, str, float, float]]:
    """For each method: name, the settings that won, accuracy on validation and on test."""
    train, validation, test = (open_source("digits", s) for s in ("train", "validation", "test"))
    for name, candidates in METHODS.items():
        fitted = {key: model.fit(pixels(train), train.labels) for key, model in candidates.items()}
        scores = {
            key: model.score(pixels(validation), validation.labels) for key, model in fitted.items()
        }
        best = max(scores, key=scores.__getitem__)
        yield name, best, scores[best], fitted[best].score(pixels(test), test.labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", help="where to save one image of the test part, a PNG")
    arguments = parser.parse_args()
    table = Table("method", "settings", "validation", "digits:test", title="classic methods")
    for name, settings, validation, test in baselines():
        table.add_row(name, settings, f"{validation:.2%}", f"{test:.2%}")
    Console().print(table)
    if arguments.write:
        test = open_source("digits", "test")
        Image.fromarray(test.images[0]).save(arguments.write)
        print(f"{arguments.write}: an image of the test part, a {test.class_names[test.labels[0]]}")


if __name__ == "__main__":
    main()
