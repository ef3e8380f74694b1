"""Why a row gets its prediction: its path through the gates, with their probabilities."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vmoe.classic.rows import Rows
from vmoe.classic.tree import TreeGate, breadth_first


@dataclass(frozen=True)
class Step:
    """A gate on the path.

    Attributes:
        gate: its index in ``gate_coef_`` of a hierarchical mixture; 0 is the root.
        child: the most probable child.
        probability: the probability of this child.
        pulls: what each column adds to the log odds of this child against the next best one, the
            largest first; a column at its mean adds nothing.
    """

    gate: int
    child: int
    probability: float
    pulls: dict[str, float]


@dataclass(frozen=True)
class Explanation:
    """The most probable path of one row.

    Attributes:
        steps: the gates from the root down.
        expert: the expert at the end.
        probability: the prior probability of this expert: the product along the path.
        prediction: the prediction of the whole mixture.
    """

    steps: list[Step]
    expert: int
    probability: float
    prediction: Any

    def __str__(self) -> str:
        lines = [
            f"gate {s.gate}: child {s.child} with {s.probability:.3f}{_reasons(s.pulls)}"
            for s in self.steps
        ]
        return "\n".join(
            [
                *lines,
                f"expert {self.expert} with {self.probability:.3f}",
                f"prediction of the mixture: {self.prediction}",
            ]
        )


def explain(rows: Rows, tree: TreeGate, names: list[str], prediction: Any) -> Explanation:
    """Follows one row to the most probable child of every gate.

    Args:
        rows: the one row.
        names: the names of the gates' columns.
        prediction: the mixture's prediction.
    """
    gates, steps, node = breadth_first(tree), [], tree
    while isinstance(node, TreeGate):
        index = next(i for i, gate in enumerate(gates) if gate is node)
        probabilities = np.exp(node.log_probabilities(rows)[0])
        child = int(probabilities.argmax())
        pulls = _pulls(node, rows.gate[0], probabilities, names)
        steps.append(Step(index, child, float(probabilities[child]), pulls))
        node = node.children[child]
    return Explanation(steps, node, float(np.prod([s.probability for s in steps])), prediction)


def _pulls(
    gate: TreeGate, row: np.ndarray, probabilities: np.ndarray, names: list[str]
) -> dict[str, float]:
    *_, second, first = [0, *np.argsort(probabilities, kind="stable")]
    pulls = ((gate.coef[first] - gate.coef[second]) * row)[1:]
    return {names[i]: float(pulls[i]) for i in np.argsort(-np.abs(pulls), kind="stable")}


def _reasons(pulls: dict[str, float]) -> str:
    shown = [f"{name} {pull:+.2f}" for name, pull in list(pulls.items())[:3]]
    return f" ({', '.join(shown)})" if shown else ""
