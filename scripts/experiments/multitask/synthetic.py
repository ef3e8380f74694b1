"""Two tasks of a chosen relatedness (Ma et al. 2018, section 3.2), many seeds at once.

u1 and u2 are orthonormal in R^100, w1 = c u1, w2 = c (p u1 + sqrt(1 - p²) u2), x ~ N(0, I), and

    y_k = w_k.x + sum_i sin(alpha_i w_k.x + beta_i) + noise of variance 0.01.

From the paper: the formula, 100 inputs, 8 experts of 16 units, towers of 8 units, p = 0.5, 0.9 and
1, Adam with a rate out of three. It does not give c, the number of sines, alpha, beta and the
number of rows: ours are those of the keras-mmoe package's generator, c = 0.3, five sines, alpha and
beta from N(0, 1), and 10,000 rows to train, 1,000 to choose, 1,000 to test.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vmoe.multitask.build import BodyConfig, new_model
from vmoe.multitask.tasks import Regression
from vmoe.multitask.training import Data, Trainer, batches
from vmoe.multitask.weighting import Weighting

D, SINES, C, NOISE = 100, 5, 0.3, 0.1
UNITS = {"shared_bottom": 113, "one_gate": 16, "mmoe": 16}
"""Units of the network or of an expert. The network and its towers have (100 + 16) * 113 = 13,108
weights; 8 experts of 16 units and two towers of 8 have 13,056."""
TOWER, EXPERTS = 8, 8
RELATED = (0.5, 0.9, 1.0)
RATES = (1e-4, 1e-3, 1e-2)
BATCH = 256
PATIENCE = 10
"""Training ends after as many epochs in which no seed has a lower validation loss than before."""


class Size(NamedTuple):
    """Training rows, test rows, epochs at most, and seeds."""

    rows: int
    tested: int
    epochs: int
    seeds: int


SIZES = {"full": Size(10_000, 1_000, 100, 50), "tiny": Size(512, 64, 2, 2)}


def draw(p: float, seed: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (rows, 100) and targets (rows, 2)."""
    random = np.random.default_rng(seed)
    u = np.linalg.qr(random.normal(size=(D, 2)))[0].T
    weights = C * np.stack([u[0], p * u[0] + np.sqrt(1 - p**2) * u[1]])
    alpha, beta = random.normal(size=(2, SINES))
    x = random.normal(size=(rows, D))
    linear = x @ weights.T
    y = linear + np.sin(alpha * linear[..., None] + beta).sum(-1)
    return x.astype(np.float32), y + NOISE * random.normal(size=y.shape)


def splits(p: float, seed: int, size: Size) -> tuple[list[Data], float]:
    """Training, validation and test rows, and the correlation of the two targets."""
    x, y = draw(p, seed, size.rows + 2 * size.tested)
    y = (y - y[: size.rows].mean(0)) / y[: size.rows].std(0)
    ends = (size.rows, size.rows + size.tested)
    parts = [
        Data(a, (b[:, 0], b[:, 1]), (jnp.ones(len(a), bool),) * 2)
        for a, b in zip(
            np.split(x, ends), map(jnp.asarray, np.split(y.astype(np.float32), ends)), strict=True
        )
    ]
    return parts, float(np.corrcoef(y.T)[0, 1])


def new_params(architecture: str, key: jax.Array) -> tuple[nnx.GraphDef, nnx.State]:
    """A new model, as its structure and its parameters."""
    config = BodyConfig(tasks=2, units=(UNITS[architecture],), experts=EXPERTS)
    outputs = {"first": 1, "second": 1}
    return nnx.split(new_model(architecture, config, D, outputs, (TOWER,), rngs=nnx.Rngs(key)))


def train(architecture: str, p: float, rate: float, seeds: range, size: Size) -> dict[str, Any]:
    """Trains a model for every seed at once.

    Returns:
        "test": by seed, the test loss (the mean of both tasks' squared errors, in units of the
        targets' variance) of the epoch that is best on the validation rows. "validation", "epoch"
        and "correlation", of the targets: by seed. "curve": after each epoch the mean of the test
        losses over the seeds, and their standard deviation.
    """
    drawn = [splits(p, seed, size) for seed in seeds]
    training, validation, test = (
        jax.tree.map(lambda *x: jnp.stack(x), *(parts[i] for parts, _ in drawn)) for i in range(3)
    )
    keys = jnp.stack([jax.random.key(seed) for seed in seeds])
    graph, _ = new_params(architecture, keys[0])
    params = jax.vmap(lambda key: new_params(architecture, key)[1])(keys)
    trainer = Trainer(graph, (Regression.loss,) * 2, Weighting(), optax.adam(rate))
    state = jax.vmap(trainer.init)(params)
    train_epoch = jax.jit(jax.vmap(trainer.epoch))
    losses = jax.jit(jax.vmap(trainer.losses))
    randoms = [np.random.default_rng([seed, 1]) for seed in seeds]
    validated, tested = [], []
    for epoch in range(size.epochs):
        order = np.stack([batches(random, size.rows, BATCH) for random in randoms])
        state, _ = train_epoch(state, training, jnp.asarray(order))
        validated.append(np.asarray(losses(state.params, validation).tasks).mean(1))
        tested.append(np.asarray(losses(state.params, test).tasks).mean(1))
        best = np.argmin(validated, axis=0)
        if epoch - best.max() >= PATIENCE:
            break
    each = np.arange(len(best))
    return {
        "test": np.array(tested)[best, each].tolist(),
        "validation": np.array(validated)[best, each].tolist(),
        "epoch": (best + 1).tolist(),
        "curve": [np.mean(tested, 1).round(6).tolist(), np.std(tested, 1).round(6).tolist()],
        "correlation": [correlation for _, correlation in drawn],
        "parameters": sum(x[0].size for x in jax.tree.leaves(params)),
    }


def measure(architecture: str, p: float, size: Size) -> dict[str, Any]:
    """The runs of all seeds with the rate of the lowest mean validation loss."""
    runs = {rate: train(architecture, p, rate, range(size.seeds), size) for rate in RATES}
    trials = {rate: float(np.mean(each["validation"])) for rate, each in runs.items()}
    rate = min(trials, key=lambda rate: trials[rate])
    return {"rate": rate, "trials": {str(k): v for k, v in trials.items()}, **runs[rate]}
