"""Measure EM on many rows: vmoe, a loop of NumPy, flexmix of R, and models of scikit-learn."""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.special import log_softmax, logsumexp
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.mixture import GaussianMixture
from sklearn.neural_network import MLPRegressor

from scripts.bench.measure import Row, measured
from scripts.experiments.mixtures.quiet import fit_quietly
from vmoe.classic import MixtureOfExpertsRegressor

FEATURES, EXPERTS, STEPS = 20, 8, 30
NEWTON = 20  # steps at most of the loop's gate
FLEXMIX_ROWS = 10_000  # flexmix is left out with more
FLEXMIX = """
suppressMessages(library(flexmix))
folder <- commandArgs(TRUE)[1]; steps <- as.integer(commandArgs(TRUE)[2])
x <- as.matrix(read.csv(file.path(folder, "x.csv"), header = FALSE))
y <- scan(file.path(folder, "y.csv"), quiet = TRUE)
start <- as.matrix(read.csv(file.path(folder, "start.csv"), header = FALSE))
seconds <- system.time(flexmix(
  y ~ x, cluster = start, concomitant = FLXPmultinom(~ x),
  control = list(iter.max = steps, tolerance = 0, minprior = 0)))[["elapsed"]]
cat(seconds)
"""


def classic(options: argparse.Namespace) -> list[Row]:
    """The CPU time of a whole fit with ``STEPS`` steps; vmoe, the loop and flexmix start alike.

    Set ``OMP_NUM_THREADS=1``, since flexmix and the network would not use more threads well.
    The mixture has 323 parameters and the network 331. The Gaussian mixture of (x, y) has 2,023,
    most of them in its covariances. The loop and flexmix run once.
    """
    x, y, start = problem(options.rows)
    steps = {"max_iter": STEPS, "tol": 0.0}
    units = EXPERTS * 2 * (FEATURES + 1) // (FEATURES + 2)  # about as many weights as the mixture
    mixture = MixtureOfExpertsRegressor(
        EXPERTS, start=start, gate_penalty=0.0, expert_penalty=0.0, **steps
    )
    gaussian = GaussianMixture(EXPERTS, init_params="random_from_data", random_state=0, **steps)
    network = MLPRegressor(
        hidden_layer_sizes=(units,), max_iter=STEPS, n_iter_no_change=STEPS, random_state=0
    )
    boosting = HistGradientBoostingRegressor(early_stopping=False, random_state=0)
    runs = {
        "vmoe": lambda: fit_quietly(mixture, x, y),
        "GaussianMixture of (x, y)": lambda: fit_quietly(gaussian, np.column_stack([x, y])),
        f"MLPRegressor, {units} units, {STEPS} passes": lambda: fit_quietly(network, x, y),
        "HistGradientBoostingRegressor": lambda: boosting.fit(x, y),
    }
    times: dict[str, tuple[float, float | None]] = dict(
        measured(runs, options.repeats, time.process_time)
    )
    begin = time.process_time()
    likelihood = loop(x, y, start)
    times["loop of NumPy"] = 1e3 * (time.process_time() - begin), None
    agree(mixture.history_[-1], likelihood)
    if (seconds := flexmix(x, y, start)) is not None:
        times["flexmix of R"] = 1e3 * seconds, None
    case = {"rows": options.rows, "features": FEATURES, "experts": EXPERTS, "steps": STEPS}
    target = "<= 20,000 ms" if options.rows == 100_000 else ""
    return [
        Row("classic", case, name, median, iqr, ratio, to, target if name == "vmoe" else "")
        for name, (median, iqr) in times.items()
        for ratio, to in [(None, "") if name == "vmoe" else (median / times["vmoe"][0], "vmoe")]
    ]


def problem(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of a mixture of linear experts, and responsibilities to start from."""
    random = np.random.default_rng(0)
    x = random.normal(size=(rows, FEATURES))
    logits = x @ random.normal(size=(FEATURES, EXPERTS)) / 2
    expert = np.argmax(logits + random.gumbel(size=logits.shape), axis=1)  # drawn by a softmax
    laws = random.normal(size=(EXPERTS, FEATURES))
    y = np.einsum("nd,nd->n", x, laws[expert]) + 0.5 * random.normal(size=rows)
    start = random.dirichlet(np.ones(EXPERTS), size=rows) + 2 * np.eye(EXPERTS)[expert]
    return x, y, start / start.sum(axis=1, keepdims=True)


def loop(x: np.ndarray, y: np.ndarray, h: np.ndarray) -> float:
    """EM as a textbook writes it, an expert at a time; returns the log-likelihood."""
    x = np.column_stack([np.ones(len(x)), x])
    gate = np.zeros((EXPERTS, x.shape[1]))
    row = np.zeros(len(x))
    for _ in range(STEPS):
        gate = newton(x, h, gate)
        joint = log_softmax(x @ gate.T, axis=1)
        for e in range(EXPERTS):
            weighted = x * h[:, [e]]
            coef = np.linalg.solve(x.T @ weighted, weighted.T @ y)
            left = y - x @ coef
            variance = h[:, e] @ left**2 / h[:, e].sum()
            joint[:, e] -= 0.5 * (left**2 / variance + np.log(2 * np.pi * variance))
        row = logsumexp(joint, axis=1)
        h = np.exp(joint - row[:, None])
    return float(row.sum())


def newton(x: np.ndarray, h: np.ndarray, gate: np.ndarray) -> np.ndarray:
    """Multinomial regression of responsibilities; the first expert's coefficients stay zero."""
    k, p = gate.shape
    for _ in range(NEWTON):
        g = np.exp(log_softmax(x @ gate.T, axis=1))
        hessian = np.zeros(((k - 1) * p, (k - 1) * p))
        for a in range(1, k):
            for b in range(1, k):
                block = x.T @ (x * (g[:, a] * ((a == b) - g[:, b]))[:, None])
                hessian[(a - 1) * p : a * p, (b - 1) * p : b * p] = block
        step = np.linalg.solve(hessian, ((h - g).T @ x)[1:].ravel()).reshape(k - 1, p)
        gate = gate + np.vstack([np.zeros(p), step])
        if np.abs(step).max() < 1e-8 * np.abs(gate).max():
            break
    return gate


def agree(ours: float, other: float) -> None:
    assert abs(ours - other) < 1e-6 * abs(other), f"the log-likelihoods differ: {ours}, {other}"


def flexmix(x: np.ndarray, y: np.ndarray, start: np.ndarray) -> float | None:
    """Seconds of flexmix on the same rows; None if it does not run, and a line says why."""
    if len(x) > FLEXMIX_ROWS:
        return left_out(f"more than {FLEXMIX_ROWS:,} rows; --rows {FLEXMIX_ROWS} measures it")
    if not shutil.which("Rscript"):
        return left_out("there is no Rscript")
    with tempfile.TemporaryDirectory() as folder:
        for name, values in {"x": x, "y": y, "start": start}.items():
            np.savetxt(Path(folder) / f"{name}.csv", values, delimiter=",", fmt="%.17g")
        command = ["Rscript", "-e", FLEXMIX, folder, str(STEPS)]
        result = subprocess.run(command, capture_output=True, text=True)
    return left_out(result.stderr) if result.returncode else float(result.stdout)


def left_out(reason: str) -> None:
    print("flexmix is left out:", " ".join(reason.split()), file=sys.stderr, flush=True)
