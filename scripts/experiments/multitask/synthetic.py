"""Two tasks of a chosen relatedness (Ma et al. 2018, section 3.2), hundreds of seeds at once.

u1 and u2 are orthonormal in R^100, w1 = c u1, w2 = c (p u1 + sqrt(1 - p²) u2), x ~ N(0, I), and

    y_k = f_k(x) + noise of variance 0.01,  f_k(x) = w_k.x + sum_i sin(alpha_i w_k.x + beta_i).

From the paper: the formula, 100 inputs, 8 experts of 16 units, towers of 8 units, p = 0.5, 0.9 and
1, Adam with a constant rate, 200 runs. It does not give c, the number of sines, alpha and beta.
Ours are those of the keras-mmoe package's generator, c = 0.3, five sines, alpha and beta from
N(0, 1); with c = 1 the functions are less linear.

Every step draws new rows, so that no model can fit rows of its own. The figure of a model is its
*excess*: the mean squared error of its predictions of f_k, in units of the variance of f_k, which
is known exactly. It is 0 at best, and 1 for the mean of the targets. The loss with noise is larger
by the variance of the noise.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from vmoe.multitask.build import BodyConfig, new_model
from vmoe.multitask.tasks import Regression
from vmoe.multitask.training import Data, Trainer
from vmoe.multitask.weighting import Weighting

D, SINES, NOISE = 100, 5, 0.1
UNITS = {"shared_bottom": 113, "one_gate": 16, "mmoe": 16}
"""Units of the network or of an expert. The network and its towers have (100 + 16) * 113 = 13,108
weights; 8 experts of 16 units and two towers of 8 have 13,056."""
TOWER, EXPERTS = 8, 8
SCALES = (1.0, 0.3)
RELATED = (0.5, 0.9, 1.0)
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
SETTINGS = tuple(itertools.product(SCALES, RELATED))


class Size(NamedTuple):
    """Steps, rows of a step, steps between two points of a curve, test rows, seeds of a row of
    figures, and seeds that choose among the rates: as many runs, so that they share a program."""

    steps: int
    batch: int
    every: int
    tested: int
    seeds: int
    search: int


SIZES = {"full": Size(1000, 64, 100, 1000, 40, 10), "tiny": Size(20, 16, 10, 64, 4, 1)}
SEARCH = 10_000
"""The first seed of the search; those of the figures start at 0."""


class Run(NamedTuple):
    """Relatedness, scale, seed of the functions, rows and parameters, and rate of a run."""

    p: float
    c: float
    seed: int
    rate: float


class Functions(NamedTuple):
    """Two functions of one seed, or of several with an axis in front.

    Attributes:
        weights: of the inputs, (2, 100).
        alpha, beta: of the sines.
        mean, deviation: of both functions, whose inputs w_k.x have the same distribution.
    """

    weights: Any
    alpha: Any
    beta: Any
    mean: Any
    deviation: Any

    def __call__(self, x: Any) -> jax.Array:
        """The values (rows, 2) without noise, standardized."""
        linear = x @ self.weights.T
        y = linear + jnp.sin(self.alpha * linear[..., None] + self.beta).sum(-1)
        return (y - self.mean) / self.deviation


def functions(p: float, c: float, seed: int) -> Functions:
    """The functions of a seed; the same directions, alpha and beta for all p and c."""
    random = np.random.default_rng(seed)
    u = np.linalg.qr(random.normal(size=(D, 2)))[0].T
    weights = c * np.stack([u[0], p * u[0] + np.sqrt(1 - p**2) * u[1]])
    alpha, beta = random.normal(size=(2, SINES))
    mean, variance = moments(c, alpha, beta)
    made = Functions(weights, alpha, beta, mean, np.sqrt(variance))
    return Functions(*(np.asarray(each, np.float32) for each in made))


def moments(c: float, alpha: np.ndarray, beta: np.ndarray) -> tuple[float, float]:
    """The mean and the variance of z + sum_i sin(alpha_i z + beta_i) for z ~ N(0, c²).

    The mean of exp(i (a z + b)) is exp(i b - a² c² / 2). Products of sines are sums of cosines, and
    the mean of z sin(a z + b) is c² times that of its derivative (Stein's lemma).
    """

    def damped(a: np.ndarray) -> np.ndarray:
        return np.exp(-((a * c) ** 2) / 2)

    mean = (damped(alpha) * np.sin(beta)).sum()
    with_z = (c**2 * alpha * damped(alpha) * np.cos(beta)).sum()
    differences = damped(alpha - alpha[:, None]) * np.cos(beta - beta[:, None])
    sums = damped(alpha + alpha[:, None]) * np.cos(beta + beta[:, None])
    return float(mean), float(c**2 + 2 * with_z + (differences - sums).sum() / 2 - mean**2)


def linear_excess(c: float, seed: int) -> float:
    """The excess of the best linear function of the inputs, for any p.

    It is 1 - r², where r is the correlation of z and f(z), whose covariance is c² times the mean of
    the derivative of f (Stein's lemma).
    """
    found = functions(1.0, c, seed)
    damped = np.exp(-((found.alpha * c) ** 2) / 2)
    slope = 1 + (found.alpha * damped * np.cos(found.beta)).sum()
    return float(1 - (c * slope / found.deviation) ** 2)


def new_params(architecture: str, key: jax.Array) -> tuple[nnx.GraphDef, nnx.State]:
    """A new model, as its structure and its parameters."""
    config = BodyConfig(tasks=2, units=(UNITS[architecture],), experts=EXPERTS)
    outputs = {"first": 1, "second": 1}
    return nnx.split(new_model(architecture, config, D, outputs, (TOWER,), rngs=nnx.Rngs(key)))


class Programs(NamedTuple):
    """The compiled programs of runs that are trained at once, each with an axis of the runs."""

    start: Any
    some_steps: Any
    tested: Any


@functools.cache
def programs(architecture: str, size: Size) -> Programs:
    """Those of an architecture, which all settings share."""
    graph, _ = new_params(architecture, jax.random.key(0))
    labels = jnp.full(2, float(size.batch))

    def trainer(rate: Any) -> Trainer:
        return Trainer(graph, (Regression.loss,) * 2, Weighting(), optax.adam(rate))

    def data(x: jax.Array, y: jax.Array) -> Data:
        return Data(x, (y[:, 0], y[:, 1]), (jnp.ones(len(x), bool),) * 2)

    @jax.jit
    @jax.vmap
    def start(key: jax.Array, rate: jax.Array) -> Any:
        return trainer(rate).init(new_params(architecture, key)[1])

    @jax.jit
    @jax.vmap
    def some_steps(state: Any, found: Functions, key: jax.Array, rate: jax.Array) -> Any:
        def step(state: Any, key: jax.Array) -> Any:
            rows, noise = jax.random.split(key)
            x = jax.random.normal(rows, (size.batch, D))
            y = found(x) + NOISE / found.deviation * jax.random.normal(noise, (size.batch, 2))
            return trainer(rate).step(state, data(x, y), labels)[0], None

        return jax.lax.scan(step, state, jax.random.split(key, size.every))[0]

    @jax.jit
    @jax.vmap
    def tested(params: Any, found: Functions, key: jax.Array, rate: jax.Array) -> jax.Array:
        x = jax.random.normal(key, (size.tested, D))
        return trainer(rate).losses(params, data(x, found(x))).tasks.mean()

    return Programs(start, some_steps, tested)


def train(architecture: str, runs: Sequence[Run], size: Size) -> np.ndarray:
    """The excess of runs that are trained at once: (points of the curve, runs).

    It is a mean over both tasks. All models of a seed see the same rows, with the same noise, in
    the same order.
    """
    found = jax.tree.map(lambda *x: np.stack(x), *(functions(r.p, r.c, r.seed) for r in runs))
    rates = jnp.array([run.rate for run in runs])
    keys = jax.vmap(jax.random.key)(jnp.array([run.seed for run in runs]))
    start, some_steps, tested = programs(architecture, size)

    def keys_of(part: int) -> jax.Array:
        return jax.vmap(jax.random.fold_in, (0, None))(keys, part)

    state, curve = start(keys, rates), []
    for point in range(size.steps // size.every):
        state = some_steps(state, found, keys_of(1 + point), rates)
        curve.append(tested(state.params, found, keys_of(0), rates))
    return np.array(curve, float)


def search(architecture: str, size: Size) -> dict[str, Any]:
    """The rate with the lowest mean excess, by setting, over seeds that no figure has."""
    tried: dict[str, dict[float, float]] = {}
    for c, p in SETTINGS:
        seeds = range(SEARCH, SEARCH + size.search)
        runs = [Run(p, c, seed, rate) for rate in RATES for seed in seeds]
        last = train(architecture, runs, size)[-1].reshape(len(RATES), -1).mean(1)
        tried[setting(c, p)] = dict(zip(RATES, np.nan_to_num(last, nan=1e9).tolist(), strict=True))
    return {
        "rate": {name: min(means, key=lambda rate: means[rate]) for name, means in tried.items()},
        "tried": {name: list(means.items()) for name, means in tried.items()},
    }


def measure(architecture: str, part: int, size: Size, rates: Mapping[str, float]) -> dict[str, Any]:
    """The runs of some seeds, by setting.

    Args:
        part: of the seeds, from 0 on.
        rates: by setting, as ``search`` found.

    Returns:
        "excess": after each of "steps", by seed. "floor": by seed, the variance of the noise in
        units of the variance of the function. "correlation": by seed, of the two functions.
    """
    seeds = range(part * size.seeds, (part + 1) * size.seeds)
    rows = np.random.default_rng(0).normal(size=(10_000, D)).astype(np.float32)
    params = jax.eval_shape(lambda key: new_params(architecture, key)[1], jax.random.key(0))
    made: dict[str, Any] = {"parameters": sum(x.size for x in jax.tree.leaves(params))}
    for c, p in SETTINGS:
        rate = rates[setting(c, p)]
        drawn = [functions(p, c, seed) for seed in seeds]
        excess = train(architecture, [Run(p, c, seed, rate) for seed in seeds], size)
        made[setting(c, p)] = {
            "rate": rate,
            "steps": list(range(size.every, size.steps + 1, size.every)),
            "excess": np.round(excess, 5).tolist(),
            "floor": [round(float((NOISE / each.deviation) ** 2), 5) for each in drawn],
            "correlation": [float(np.corrcoef(each(rows).T)[0, 1].round(4)) for each in drawn],
        }
    return made


def setting(c: float, p: float) -> str:
    return f"c {c:g}, p {p:g}"
