"""The arm learned by six methods, each with settings chosen on validation rows.

Jordan & Jacobs 1994, table 1: the relative error on test rows, and the passes through the data. The
error is the mean squared error divided by the variance, here as the mean over the four joints. A
fifth of the training rows decide between settings; then all train the chosen one.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.compose import TransformedTargetRegressor
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import ParameterGrid
from sklearn.multioutput import MultiOutputRegressor
from sklearn.neural_network import MLPRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.tree import DecisionTreeRegressor

from scripts.experiments.mixtures import arm
from scripts.experiments.mixtures.quiet import fit_quietly
from vmoe.classic import HierarchicalMixtureRegressor

HIDDEN = 60  # units of the network
BRANCHING = (2, 2, 2, 2)  # 15 gates and 16 experts
TRAINED, TESTED = 15_000, 5_000  # rows
VALIDATED = 0.2  # of the training rows
FIRST = 1_000  # rows of the first batch on line; for an output, 16 experts have 208 coefficients


class Online(RegressorMixin, BaseEstimator):
    """The hierarchy with one update for each batch of rows, in an order that is drawn anew.

    The first batch, which is fitted as a whole, has ``FIRST`` rows.

    Args:
        passes: through the rows.
        batch_size: rows of an update.
        random_state: a seed of the start and of the orders.
    """

    def __init__(self, passes: int = 2, batch_size: int = 100, random_state: int = 0):
        self.passes, self.batch_size, self.random_state = passes, batch_size, random_state

    def fit(self, x: np.ndarray, y: np.ndarray) -> "Online":
        self.model_ = HierarchicalMixtureRegressor(BRANCHING, random_state=self.random_state)
        for rows in self._batches(len(x)):
            self.model_.partial_fit(x[rows], y[rows])
        return self

    def predict(self, x: np.ndarray) -> np.ndarray:
        return self.model_.predict(x)

    def _batches(self, n: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(self.random_state)
        for size in (FIRST, *[self.batch_size] * (self.passes - 1)):
            yield from np.split(rng.permutation(n), range(size, n, self.batch_size))


class Method(NamedTuple):
    """A way to learn the arm.

    Attributes:
        label: its name in the table.
        published: the paper's relative error and passes; None where there is none.
        make: the model for a seed and settings.
        grid: the settings that are tried.
    """

    label: str
    published: tuple[float | None, int | None]
    make: Callable[..., Any]
    grid: dict[str, tuple[Any, ...]] = {}


def network(seed: int, passes: int, rate: float) -> Any:
    return MLPRegressor(
        hidden_layer_sizes=(HIDDEN,),
        activation="tanh",
        learning_rate_init=rate,
        max_iter=passes,
        n_iter_no_change=passes,
        random_state=seed,
    )


def hierarchy(seed: int, passes: int, gate_penalty: float) -> Any:
    return HierarchicalMixtureRegressor(
        BRANCHING, gate_penalty=gate_penalty, max_iter=passes, random_state=seed
    )


def cart(seed: int, leaf: int) -> Any:
    return DecisionTreeRegressor(min_samples_leaf=leaf, random_state=seed)


def boosting(seed: int, leaves: int, rate: float) -> Any:
    one = HistGradientBoostingRegressor(
        max_leaf_nodes=leaves,
        learning_rate=rate,
        max_iter=1_000,
        early_stopping=True,
        random_state=seed,
    )
    return MultiOutputRegressor(one)


METHODS = {
    "linear": Method("linear", (0.31, 1), lambda seed: LinearRegression()),
    "network": Method(
        f"network, {HIDDEN} units",
        (0.09, 5_500),
        network,
        {"rate": (1e-3, 4e-3), "passes": (100, 400)},
    ),
    "hierarchy": Method(
        "hierarchy by EM, 16 experts",
        (0.10, 35),
        hierarchy,
        {"gate_penalty": (0.01, 1.0, 10.0), "passes": (35, 100)},
    ),
    "online": Method(
        "hierarchy on line, 16 experts",
        (0.12, 2),
        lambda seed, **settings: Online(random_state=seed, **settings),
        {"passes": (2, 5), "batch_size": (200, 50)},
    ),
    "cart": Method("CART", (0.17, None), cart, {"leaf": (1, 2, 5, 10, 20)}),
    "boosting": Method(
        "gradient boosting of trees",
        (None, None),
        boosting,
        {"leaves": (15, 31, 63), "rate": (0.1, 0.2)},
    ),
}


def measure(name: str, seed: int, share: float, settings: int | None) -> dict[str, Any]:
    """The error of a method on an arm's rows that a seed draws.

    Args:
        name: a key of ``METHODS``.
        share: fraction of the paper's number of rows.
        settings: how many are tried; None for all.

    Returns:
        "error" is the mean of "errors", one for each joint; "settings" are the chosen ones, and
        "validation" has the settings that were compared with their errors, none if there is only
        one; "passes" may be None.
    """
    method, rng = METHODS[name], np.random.default_rng(seed)
    x, y = arm.sample(round(share * TRAINED), rng)
    x_test, y_test = arm.sample(round(share * TESTED), rng)
    tried = list(ParameterGrid(method.grid))[:settings]
    compared = tried if len(tried) > 1 else []
    errors = validate(method, seed, compared, x, y)
    chosen = compared[int(np.argmin(errors))] if compared else tried[0]
    model = fit(method.make(seed, **chosen), x, y)
    own = relative_errors(model.predict(x_test), y_test)
    return {
        "error": float(own.mean()),
        "errors": own.tolist(),
        "settings": chosen,
        "passes": passes_of(model.regressor_[-1]),
        "validation": [list(each) for each in zip(compared, errors, strict=True)],
    }


def validate(
    method: Method, seed: int, tried: list[dict[str, Any]], x: np.ndarray, y: np.ndarray
) -> list[float]:
    """The error of each setting on the last fifth of the rows."""
    cut = round((1 - VALIDATED) * len(x))
    errors = []
    for settings in tried:
        model = fit(method.make(seed, **settings), x[:cut], y[:cut])
        errors.append(float(relative_errors(model.predict(x[cut:]), y[cut:]).mean()))
    return errors


def fit(model: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """The model behind inputs and before outputs of mean 0 and variance 1, fitted."""
    scaled = TransformedTargetRegressor(
        make_pipeline(StandardScaler(), model), transformer=StandardScaler()
    )
    return fit_quietly(scaled, x, y)


def relative_errors(predicted: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The mean squared error of each output, divided by its variance."""
    return ((predicted - y) ** 2).mean(0) / y.var(0)


def passes_of(model: Any) -> int | None:
    """The passes of a fitted model through its rows."""
    if isinstance(model, LinearRegression):
        return 1
    return getattr(model, "n_iter_", getattr(model, "passes", None))
