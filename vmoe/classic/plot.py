"""A picture of a mixture as a tree: at every gate, its probabilities along its direction."""

from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.utils.validation import check_is_fitted

from vmoe.classic.estimator import MixtureEstimator
from vmoe.classic.experts.interface import FittedExpert
from vmoe.classic.partition import check_learned
from vmoe.classic.splits import direction
from vmoe.classic.tree import TreeGate, leaves

OUTPUTS = 3  # outputs at most that a leaf shows
LEAST = 0.01  # the least change of log odds over a standard deviation that a leaf shows
REACH = 3.0  # standard deviations to either side that a gate's curves show


def plot_tree(mixture: Any, *, ax: Any = None, feature_names: list[str] | None = None) -> Any:
    """Draws a fitted mixture as a soft decision tree.

    A gate shows the probability of every child for rows along its direction, in standard
    deviations from the mean row, and the columns that matter most. A leaf shows its expert: the
    intercept and the two slopes that matter most, for three outputs at most; for a logistic expert,
    the class that it finds most probable for the mean row, with its probability there and the
    slopes of its log odds; for an estimator of scikit-learn, its name.

    Args:
        mixture: a fitted estimator of `vmoe.classic`.
        ax: axes of matplotlib; new ones if None.
        feature_names: the names of the columns of X; those seen in ``fit`` if None.

    Returns:
        the axes.

    Raises:
        ValueError: it is another estimator, the names are too few or too many, or the gate is a
            partition.
    """
    if not isinstance(mixture, MixtureEstimator):
        raise ValueError(f"mixture={mixture!r}: expected an estimator of vmoe.classic")
    check_is_fitted(mixture)
    check_learned(mixture._mixture.tree)
    names = mixture._names(feature_names)
    if ax is None:
        import matplotlib.pyplot as plt

        ax = plt.figure(figsize=(2.5 * len(leaves(mixture._mixture.tree)) + 1, 5)).add_subplot()
    ax.set_axis_off()
    tree = mixture._mixture.tree
    depth = _depth(tree)
    ax.set(xlim=(-0.6, len(leaves(tree)) - 0.4), ylim=(-0.5, depth + 0.5))
    _draw(ax, mixture, tree, depth, names)
    return ax


def _depth(node: TreeGate | int) -> int:
    return 1 + max(map(_depth, node.children)) if isinstance(node, TreeGate) else 0


def _draw(ax: Any, mixture: Any, node: TreeGate | int, height: float, names: list[str]) -> float:
    """Draws a node and all below it; returns its horizontal position."""
    if isinstance(node, int):
        text = f"expert {node}\n{_describe(mixture, node, names)}"
        ax.text(node, height, text, ha="center", va="top", bbox={"boxstyle": "round", "fc": "w"})
        return float(node)
    places = [_draw(ax, mixture, child, height - 1, names) for child in node.children]
    place = float(np.mean(places))
    for k, (child, below) in enumerate(zip(node.children, places, strict=True)):
        end = height - (0.95 if isinstance(child, int) else 0.7)  # behind a gate's title
        ax.plot([place, below], [height - 0.25, end], color=f"C{k}", zorder=0)
    inset = ax.inset_axes((place - 0.4, height - 0.25, 0.8, 0.5), transform=ax.transData)
    _draw_gate(inset, node, [names[i] for i in mixture._view.gate_columns])
    return place


def _draw_gate(ax: Any, gate: TreeGate, names: list[str]) -> None:
    """The probability of each child along the direction of the last one."""
    along, t = direction(gate)[-1], np.linspace(-REACH, REACH, 121)
    logits = gate.coef[:, 0] + np.outer(t, gate.coef[:, 1:] @ along)
    ax.plot(t, softmax(logits, axis=1))
    ax.set(ylim=(0, 1), xticks=[-REACH, 0, REACH], yticks=[0, 1])
    ax.tick_params(labelsize="x-small")
    largest = np.argsort(-np.abs(along), kind="stable")[:2]
    title = ", ".join(f"{along[i]:+.2f} {names[i]}" for i in largest if along[i])
    opaque = {"fc": "w", "ec": "none", "pad": 2}
    ax.set_title(title or "constant", fontsize="small", bbox=opaque)


def _describe(mixture: Any, expert: int, names: list[str]) -> str:
    """The text about one expert."""
    fitted, view = mixture.experts_[expert], mixture._view
    if not isinstance(fitted, FittedExpert):
        return type(fitted).__name__
    coef, design = np.atleast_2d(fitted.coef_), view.expert_design
    names = [names[i] for i in view.expert_columns]
    if fitted.kind != "logistic":
        outputs = [f"{row[0]:.2g} {_terms(row[1:], design.scale, names)}" for row in coef[:OUTPUTS]]
        return "\n".join(outputs + ["..."] * (len(coef) > OUTPUTS))
    coef = coef if len(mixture.classes_) == len(coef) else np.vstack([0 * coef, coef])
    p = softmax(coef[:, 0] + coef[:, 1:] @ design.mean)
    best = p.argmax()
    others = (coef.sum(axis=0) - coef[best]) / max(len(coef) - 1, 1)
    terms = _terms((coef[best] - others)[1:], design.scale, names, LEAST)
    return f"class {mixture.classes_[best]} ({p[best]:.2f})\n{terms}".rstrip()


def _terms(slopes: np.ndarray, scale: np.ndarray, names: list[str], least: float = 0.0) -> str:
    """The two slopes with the largest change over a standard deviation, if it reaches ``least``."""
    effects = np.abs(slopes * scale)
    largest = np.argsort(-effects, kind="stable")[:2]
    return " ".join(f"{slopes[i]:+.2g} {names[i]}" for i in largest if effects[i] >= least)
