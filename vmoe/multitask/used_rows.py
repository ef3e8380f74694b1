"""A training step on those rows of large matrices of embeddings that its batch uses.

The optimizer sees only these rows and their moments, so its time does not depend on the number of
categories. With Adam this is its lazy form: the moments of other rows stay as they are, and weight
decay, if it is for embeddings, acts at the steps that use a row. The number of steps in Adam's bias
correction is that of all steps, as in ``torch.optim.SparseAdam``.

An average of the parameters is exact: those of other rows do not change meanwhile, so that their
average follows from the number of steps when they are used next, or at the end of an epoch.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Int

from vmoe.multitask.columns import Table, TableRows

Slots = tuple[Int[Array, "_"], ...]


class UsedRows(NamedTuple):
    """Rows of the matrices of a ``TableRows``.

    Attributes:
        codes: the rows of each matrix that a batch uses, repeated; all rows, if it has fewer.
        first: whether it is used, and stands for all that repeat it.
    """

    codes: tuple[Int[Array, "_"], ...]
    first: tuple[Bool[Array, "_"], ...]

    def take(self, tree: Any) -> Any:
        """Parameters, moments and averages with these rows alone."""
        return at_matrices(len(self.codes), lambda i, leaf: leaf[self.codes[i]], tree)

    def put(self, tree: Any, taken: Any) -> Any:
        """Parameters, moments and averages, with those of ``take`` as they have become."""

        return at_matrices(len(self.codes), self.put_matrix, tree, taken)

    def put_matrix(self, i: int, leaf: Array, rows: Array) -> Array:
        """A matrix of ``put``, or an array with a number for each of its rows."""
        at = jnp.where(self.first[i], self.codes[i], len(leaf))
        return leaf.at[at].set(rows, mode="drop")


def at_matrices(matrices: int, function: Callable[..., Array], *trees: Any) -> Any:
    """The last tree, with each matrix of embeddings replaced by a function of it in all trees.

    Parameters, each kind of moments and averages are a state of their own, with paths of the model.

    Args:
        matrices: their number; 0 if the model's inputs are no ``TableRows``.
    """

    def of_leaf(path: Any, *leaves: Array) -> Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found = re.match(r"inputs/vectors/(\d+)/embedding\b", name)
        return function(int(found[1]), *leaves) if found and matrices else leaves[-1]

    def of_state(*nodes: Any) -> Any:
        if isinstance(nodes[0], nnx.State):
            return jax.tree.map_with_path(of_leaf, *nodes)
        return nodes[-1]

    return jax.tree.map(of_state, *trees, is_leaf=lambda node: isinstance(node, nnx.State))


def new_slots(inputs: Any) -> Slots:
    """What ``used_rows`` writes to, for the module ``MultiTask.inputs``."""
    if not isinstance(inputs, TableRows):
        return ()
    return tuple(jnp.zeros(each.num_embeddings, jnp.int32) for each in inputs.vectors)


def used_rows(inputs: Any, given: Any, slots: Slots) -> tuple[UsedRows, Any, Slots]:
    """The rows that a batch uses, and its inputs with codes among these.

    Each code writes its place in the batch to the slot of its row. The one that is left stands for
    all that repeat it; this takes a fraction of the time of sorting. Of a matrix with no more rows
    than the batch has codes, all are taken, and those that it uses are put back.

    Args:
        inputs: the module ``MultiTask.inputs``.
        given: its inputs.
        slots: of ``new_slots`` or the last call; what they hold does not matter.
    """
    if not slots:
        return UsedRows((), ()), given, slots
    codes, lists = given.codes, list(given.lists)
    flats, firsts, after = [], [], []
    for matrix, columns in enumerate(inputs.columns):
        rows = len(slots[matrix])
        single = codes[:, np.array(columns, int)]
        of_lists = [i for i, each in enumerate(inputs.lists) if each == matrix]
        filled = [jnp.where(lists[i] < 0, lists[i][:, :1], lists[i]) for i in of_lists]
        flat = jnp.concatenate([each.ravel() for each in (single, *filled)])
        if rows <= len(flat):  # fewer than their repetitions: each of them once
            flats.append(jnp.arange(rows))
            firsts.append(jnp.zeros(rows, bool).at[flat].set(True))
            after.append(slots[matrix])
            continue
        places = jnp.arange(len(flat), dtype=jnp.int32)
        after.append(slots[matrix].at[flat].set(places))
        place = after[-1][flat]
        codes = codes.at[:, np.array(columns, int)].set(place[: single.size].reshape(single.shape))
        at = single.size
        for i in of_lists:
            own = place[at : (at := at + lists[i].size)].reshape(lists[i].shape)
            lists[i] = jnp.where(lists[i] < 0, -1, own)
        flats.append(flat)
        firsts.append(place == places)
    return (
        UsedRows(tuple(flats), tuple(firsts)),
        Table(given.numbers, codes, tuple(lists)),
        tuple(after),
    )
