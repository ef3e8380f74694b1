"""Random parameters for which a wrong GELU or a wrong epsilon shows in the outputs."""

import math
import re
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

Arrays = dict[str, Any]  # of NumPy
Shapes = dict[str, tuple[int, ...]]

CLASSES = 10
LABELS = ("plum", "pear", "fig", "lime", "kiwi", "date", "sloe", "nut", "hop", "rye")

# The first pattern in a parameter's name gives the mean and the spread of its values; the spread of
# a matrix is divided by the root of its fan-in. Hidden units are around -2, where the values of the
# GELUs are small and their differences large.
DRAWS = (
    (r"norm\w*\.weight$|/scale$|gamma$|lambda1$", 1.0, 0.3),
    (r"((fc1|up_proj)\.bias|Dense_0/bias)$", -2.5, 0.6),
    (r"bias$|token|cls$|pos|latent|probe", 0.0, 0.5),
    (r"((fc1|up_proj)\.weight|Dense_0/kernel)$", 0.0, 0.8),
    (r"((fc2|down_proj)\.weight|Dense_1/kernel)$", 0.0, 20.0),
    (r"", 0.0, 1.5),
)
# Parameters that scale the contributions of the patches and the blocks to the tokens.
ADDED = re.compile(r"token|cls|pos|patch|embedding|attn\.proj|o_proj|/out/|fc2|Dense_1|norm_pre")


class Model(Protocol):
    """A model of one family: its outputs, also with another GELU or epsilon, and its files."""

    @property
    def size(self) -> int: ...

    def outputs(
        self,
        images: np.ndarray,
        dtype: str = "float64",
        gelu: str | None = None,
        epsilon: float | None = None,
    ) -> Arrays: ...

    @property
    def write(self) -> Callable[[str], None]: ...


def draw(shapes: Shapes, seed: int, small: bool) -> Arrays:
    """Float32 parameters; ``small`` gives tokens of about 1e-3."""
    rng = np.random.default_rng(seed)
    values = {}
    for key in sorted(shapes):
        mean, spread = next((m, s) for pattern, m, s in DRAWS if re.search(pattern, key))
        spread /= math.sqrt(fan_in(key, shapes[key]))
        value = mean + spread * rng.standard_normal(shapes[key])
        values[key] = np.float32(value * (1e-3 if small and ADDED.search(key) else 1))
    return values


def fan_in(name: str, shape: tuple[int, ...]) -> int:
    """The number of inputs that a matrix sums over; 1 for vectors, tokens and positions."""
    if name.endswith("kernel"):
        return shape[0] if re.search("query|key|value", name) else math.prod(shape[:-1])
    return math.prod(shape[1:]) if name.endswith("weight") else 1
