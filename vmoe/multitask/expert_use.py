"""How tasks use experts: experts that no task uses, equal experts, and a picture."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float

from vmoe.nn.experts import Copies, StackedMlps
from vmoe.trees import path_name

MIN_USE = 0.1
"""An expert is unused if its mean weight for each task is below this fraction of a uniform one."""


def unused_experts(
    use: Mapping[str, Float[np.ndarray, "e"]], names: Sequence[str], seen: int
) -> Iterator[str]:
    """Experts that no task uses.

    Args:
        use: the mean weights of the experts by task.
        names: the names of the experts.
        seen: the number of experts that the gate of a task sees.
    """
    most = np.max(list(use.values()), axis=0)
    for name, weight in zip(names, most, strict=True):
        if weight < MIN_USE / seen:
            yield f"no task uses expert {name}: its mean weight is at most {weight:.3f}"


def equal_experts(model: nnx.Module) -> Iterator[str]:
    """Experts whose parameters are equal.

    Only the gates can tell such experts apart: where a gate gives them equal weights, they get
    equal gradients and stay equal.
    """
    first: dict[bytes, str] = {}  # the first expert with these parameters
    for path, module in nnx.iter_modules(model, graph=True):
        if not isinstance(module, Copies | StackedMlps):
            continue
        stacked = module.stacked if isinstance(module, Copies) else module
        params = [np.asarray(x) for x in jax.tree.leaves(nnx.state(stacked, nnx.Param, graph=True))]
        if not params and module.num_experts > 1:
            yield f"experts of {path_name(path)} are equal: they have no parameters"
        for i in range(module.num_experts if params else 0):
            digest = hashlib.sha256(b"".join(x[i].tobytes() for x in params)).digest()
            name = f"{i} of {path_name(path)}"
            if (equal := first.setdefault(digest, name)) != name:
                yield f"experts {equal} and {name} are equal: use different seeds"


def plot_expert_use(model: Any, X: Any, *, ax: Any = None) -> Any:
    """Draws the mean weight of each expert for each task, as a matrix.

    Args:
        model: a fitted estimator of `vmoe.multitask` whose architecture has gates.
        X: the rows over which weights are averaged.
        ax: axes of matplotlib; new ones if None.

    Returns:
        the axes.
    """
    return draw_use(model.expert_use(X), model.expert_names_, ax=ax)


def draw_use(
    use: Mapping[str, Float[np.ndarray, "e"]], names: Sequence[str], *, ax: Any = None
) -> Any:
    """Draws the mean weights of experts for each task.

    Args:
        use: the weights by task.
        names: the names of the experts.
        ax: see ``plot_expert_use``.
    """
    shares = np.stack(list(use.values()))
    if ax is None:
        import matplotlib.pyplot as plt

        size = (0.7 * shares.shape[1] + 3, 0.5 * len(shares) + 1.6)
        ax = plt.figure(figsize=size, layout="constrained").add_subplot()
    image = ax.imshow(shares, cmap="Blues", vmin=0, vmax=max(shares.max(), 1e-9))
    for (row, column), share in np.ndenumerate(shares):
        dark = share > 0.6 * shares.max()
        ax.text(column, row, f"{share:.2f}", ha="center", va="center", color="w" if dark else "k")
    ax.set_xticks(range(shares.shape[1]), names)
    ax.set_yticks(range(len(use)), use)
    ax.set_xlabel("expert")
    ax.figure.colorbar(image, ax=ax, label="mean weight")
    return ax
