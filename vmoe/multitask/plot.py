"""A picture of how tasks use experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


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
