"""Two tasks on drawings: what the gates for category and vendor share.

The tokens of the packaged ``vmoe_emoji``, which is frozen and was trained on categories, feed one
layer of experts with a gate for each task. Each token is a row, and a tower takes the mean of an
image's tokens.
"""

import functools
import hashlib
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float
from sklearn.linear_model import LogisticRegression

import vmoe
from vmoe.multitask import MultiGate, MultiTask
from vmoe.multitask.build import ReluLayers
from vmoe.multitask.tasks import Classification
from vmoe.multitask.training import Data, Trainer, forward
from vmoe.multitask.weighting import Weighting

EXPERTS, UNITS, RATE, BATCH = 8, 32, 1e-3, 64
TASKS = ("category", "vendor")


class Size(NamedTuple):
    """Images of a split (None for all) and epochs."""

    images: int | None
    epochs: int


SIZES = {"full": Size(None, 30), "tiny": Size(48, 1)}


class Drawings(NamedTuple):
    """Tokens of drawings, and their labels by task."""

    tokens: Float[Array, "b n d"]
    labels: dict[str, np.ndarray]


class Rows(nnx.Module):
    """Tokens of all images as rows."""

    def __call__(self, tokens: Float[Array, "b n d"]) -> Float[Array, "r d"]:
        return tokens.reshape(-1, tokens.shape[-1])


class Pooled(nnx.Module):
    """A linear layer of the mean of an image's tokens."""

    def __init__(self, n: int, width: int, outputs: int, *, rngs: nnx.Rngs):
        self.n, self.linear = n, nnx.Linear(width, outputs, rngs=rngs)

    def __call__(self, features: Float[Array, "r f"]) -> Float[Array, "b q"]:
        return self.linear(features.reshape(-1, self.n, features.shape[-1]).mean(1))


def load(folder: Path, split: str, images: int | None) -> Drawings:
    """The drawings of a split of ``scripts.prepare.emoji``.

    Raises:
        SystemExit: the folder has no such split.
    """
    paths = paths_of(folder, split)
    paths = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[:images]]
    loaded = vmoe.load("vmoe_emoji")
    features: Callable[..., Array] = jax.jit(loaded.model.forward_features)
    size = min(128, len(paths))
    tokens = []
    for start in range(0, len(paths), size):
        chosen = paths[start : start + size]
        padded = chosen + chosen[:1] * (size - len(chosen))
        tokens.append(np.asarray(features(loaded.preprocess(padded)))[: len(chosen)])
    labels = {
        "category": np.array([path.parent.name for path in paths]),
        "vendor": np.array([path.stem.rpartition("-")[2] for path in paths]),
    }
    return Drawings(jnp.asarray(np.concatenate(tokens), jnp.float32), labels)


def paths_of(folder: Path, split: str) -> list[Path]:
    """The images of a split.

    Raises:
        SystemExit: there is none.
    """
    if not (paths := sorted((folder / split).glob("*/*.png"))):
        raise SystemExit(f"{folder}: no drawings in {split}: run python -m scripts.prepare.emoji")
    return paths


@functools.cache
def checksum(folder: Path, split: str) -> str:
    """The SHA-256 of the names and bytes of a split's images."""
    digest = hashlib.sha256()
    for path in paths_of(folder, split):
        digest.update(f"{path.parent.name}/{path.name}".encode() + path.read_bytes())
    return digest.hexdigest()


def probe(folder: Path, size: Size) -> dict[str, float]:
    """The accuracy of a logistic regression of the mean token on each task."""
    train, test = (load(folder, split, size.images) for split in ("train", "test"))
    x, x_test = (np.asarray(each.tokens.mean(1)) for each in (train, test))
    return {
        name: float(
            LogisticRegression(max_iter=2000)
            .fit(x, train.labels[name])
            .score(x_test, test.labels[name])
        )
        for name in TASKS
    }


def new_model(n: int, width: int, outputs: dict[str, int], gates: int, seed: int) -> MultiTask:
    """A layer of experts with a gate for each task, or one for both."""
    rngs = nnx.Rngs(seed)
    experts = [ReluLayers(width, (UNITS,), rngs=rngs) for _ in range(EXPERTS)]
    made = [nnx.Linear(width, EXPERTS, use_bias=False, rngs=rngs) for _ in range(gates)]
    towers = {name: Pooled(n, UNITS, q, rngs=rngs) for name, q in outputs.items()}
    return MultiTask(MultiGate(experts, [made[0], made[-1]]), towers, Rows())


def measure(folder: Path, gates: int, seed: int, size: Size) -> dict[str, Any]:
    """See ``compare``."""
    train, test = (load(folder, split, size.images) for split in ("train", "test"))
    return compare(train, test, gates, seed, size.epochs)


def compare(train: Drawings, test: Drawings, gates: int, seed: int, epochs: int) -> dict[str, Any]:
    """Accuracies of two tasks, and how much their gates share.

    Returns:
        "accuracy" by task; "overlap", the mean over tokens of the sum over experts of the smaller
        of both weights, and "by_chance", the same for weights from different tokens; "use", the
        mean weight of each expert by task.
    """
    every = np.ones(len(train.tokens), bool)
    tasks = [Classification(name, labels, every) for name, labels in train.labels.items()]
    model = nnx.split(trained(train, tasks, gates, seed, epochs))
    outputs, weights, _ = forward(*model, test.tokens)
    first, second = np.asarray(weights)
    others = np.random.default_rng(0).permutation(len(second))
    return {
        "accuracy": {
            name: float((task.predict(np.asarray(outputs[name])) == test.labels[name]).mean())
            for name, task in zip(train.labels, tasks, strict=True)
        },
        "overlap": float(np.minimum(first, second).sum(1).mean()),
        "by_chance": float(np.minimum(first, second[others]).sum(1).mean()),
        "use": {
            task.name: weights.mean(0).tolist()
            for task, weights in zip(tasks, (first, second), strict=True)
        },
    }


def trained(
    train: Drawings, tasks: list[Classification], gates: int, seed: int, epochs: int
) -> MultiTask:
    """A trained model."""
    _, n, width = train.tokens.shape
    outputs = {task.name: task.size for task in tasks}
    graph, params = nnx.split(new_model(n, width, outputs, gates, seed))
    losses_of = tuple(task.loss for task in tasks)
    trainer = Trainer(graph, losses_of, Weighting(), optax.adamw(RATE, weight_decay=0.01))
    every = np.ones(len(train.tokens), bool)
    codes = tuple(jnp.asarray(task.encode(train.labels[task.name], every)) for task in tasks)
    data = Data(train.tokens, codes, (jnp.asarray(every),) * 2)
    random = np.random.default_rng(seed)
    *_, last = islice(trainer.epochs(trainer.init(params), data, None, random, BATCH), epochs)
    return nnx.merge(graph, last.params)
