"""A tree of gates with experts as its leaves; a flat mixture has one gate.

Jordan & Jacobs 1994, section 2, for any depth and branching: a gate is a softmax over its children,
and the prior probability of an expert is the product of the gates on its path.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float, Int

from vmoe.classic.experts.interface import alive
from vmoe.classic.multinomial import fit_multinomial, log_softmax, penalty_of
from vmoe.classic.newton import Newton
from vmoe.classic.rows import Rows


@dataclass
class TreeGate:
    """A gate and what is below it.

    Attributes:
        children: gates, or the indices of experts.
        coef: coefficients (k, p) for standardized columns, which are zero for the first child.
        newton: the method that fits them.
    """

    children: list["TreeGate | int"]
    coef: Float[np.ndarray, "k p"] = field(default_factory=lambda: np.zeros((0, 0)))
    newton: Newton = field(default_factory=Newton, repr=False, compare=False)

    def log_probabilities(self, rows: Rows) -> Float[np.ndarray, "n k"]:
        """The logarithm of the probability of every child, for rows that reach this gate."""
        return log_softmax(self.coef @ rows.gate.T).T

    def log_prior(self, rows: Rows) -> Float[np.ndarray, "n e"]:
        """The logarithm of the prior probability of every expert below, in their order."""
        own = self.log_probabilities(rows)
        each = [
            own[:, k : k + 1]
            if isinstance(child, int)
            else own[:, k : k + 1] + child.log_prior(rows)
            for k, child in enumerate(self.children)
        ]
        return np.concatenate(each, axis=1)

    def update(self, rows: Rows, mass: Float[np.ndarray, "n e"], penalty: float) -> None:
        """The M-step of this gate and those below, from the mass of every expert below.

        The targets of a gate are the masses of its children, so that a row counts as much as of
        its mass reaches the gate (h_i for the gate with the targets h_j|i).
        """
        masses = self.child_masses(mass)
        self.coef = fit_multinomial(rows.gate, masses, penalty, self.coef, self.newton)
        for child, part, some in zip(self.children, self.parts(mass), alive(masses), strict=True):
            if isinstance(child, TreeGate) and some:
                child.update(rows, part, penalty)

    def child_masses(self, mass: Float[np.ndarray, "n e"]) -> Float[np.ndarray, "n k"]:
        """The mass that goes to every child."""
        return np.stack([part.sum(axis=1) for part in self.parts(mass)]).T

    def parts(self, mass: Float[np.ndarray, "n e"]) -> list[Float[np.ndarray, "n _"]]:
        """The columns of the experts below each child."""
        sizes = [len(leaves(child)) for child in self.children]
        return np.split(mass, np.cumsum(sizes)[:-1], axis=1)

    def penalty(self, strength: float) -> float:
        """What this gate and those below subtract from the log-likelihood."""
        return sum(penalty_of(gate.coef, strength) for gate in breadth_first(self))

    def n_parameters(self) -> int:
        """The number of free parameters of this gate and those below."""
        return sum(gate.coef[1:].size for gate in breadth_first(self))


def grow(branching: Sequence[int], n_columns: int) -> TreeGate:
    """A tree in which a gate at depth i has ``branching[i]`` children, with zero coefficients."""
    return _grow(tuple(branching), n_columns, iter(range(int(np.prod(branching)))))


def _grow(branching: tuple[int, ...], n_columns: int, experts: Iterator[int]) -> TreeGate:
    width, *below = branching
    children = [
        _grow(tuple(below), n_columns, experts) if below else next(experts) for _ in range(width)
    ]
    return TreeGate(children, np.zeros((width, n_columns + 1)))


def leaves(node: TreeGate | int) -> list[int]:
    """The experts below a node, from left to right."""
    if isinstance(node, int):
        return [node]
    return [leaf for child in node.children for leaf in leaves(child)]


def breadth_first(tree: TreeGate) -> list[TreeGate]:
    """All gates, level by level: the order of ``gate_coef_``."""
    gates = [tree]
    for gate in gates:
        gates.extend(child for child in gate.children if isinstance(child, TreeGate))
    return gates


def split_leaf(tree: TreeGate, expert: int) -> TreeGate:
    """A copy of the tree whose gate has two experts in the place of one; later ones count up."""
    return _split(tree, expert, iter(range(len(leaves(tree)) + 1)))


def _split(gate: TreeGate, expert: int, numbers: Iterator[int]) -> TreeGate:
    children: list[TreeGate | int] = []
    for child in gate.children:
        if isinstance(child, TreeGate):
            children.append(_split(child, expert, numbers))
        elif child == expert:
            coef = np.zeros((2, gate.coef.shape[1]))
            children.append(TreeGate([next(numbers), next(numbers)], coef))
        else:
            children.append(next(numbers))
    return TreeGate(children, gate.coef.copy())


def origins(small: TreeGate | int, tree: TreeGate | int) -> list[int]:
    """The leaf of a small tree from which each expert of a tree has grown, by splits of leaves.

    The list is empty if no splits of leaves make the small tree into the other one.
    """
    if isinstance(small, int):
        return [small] * len(leaves(tree))
    if isinstance(tree, int) or type(small) is not type(tree):
        return []
    if len(small.children) != len(tree.children):
        return []
    below = list(map(origins, small.children, tree.children))
    return [leaf for part in below for leaf in part] if all(below) else []


def hard_route(tree: TreeGate, rows: Rows) -> Int[np.ndarray, "n"]:
    """The expert that each row reaches if it goes to the most probable child of every gate."""
    choice = tree.log_probabilities(rows).argmax(axis=1)
    expert = np.empty(len(choice), int)
    for k, child in enumerate(tree.children):
        here = choice == k
        expert[here] = hard_route(child, rows)[here] if isinstance(child, TreeGate) else child
    return expert
