"""Training on arrays in memory."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vmoe.errors import UsageError
from vmoe.multitask.tasks import Task
from vmoe.multitask.weighting import Losses, Weighting
from vmoe.trees import path_name


class Data(NamedTuple):
    """Rows with targets.

    Attributes:
        inputs: the model's inputs, an array or a tree of arrays with an axis b in front.
        targets: the encoded targets (b,) of each task.
        labeled: whether a row has a target, for each task.
    """

    inputs: Any
    targets: tuple[Any, ...]
    labeled: tuple[Bool[Array | np.ndarray, "b"], ...]


EVAL_BATCH_SIZE = 8192  # rows of a forward pass without training


class TrainerState(NamedTuple):
    """What a training step changes."""

    params: nnx.State
    moments: Any
    weighting: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Trainer:
    """Trains models of one structure.

    All methods but ``fit`` are functions of arrays: compile them by ``jax.jit``, and map them over
    seeds by ``jax.vmap``.

    Attributes:
        graph: the structure, see ``nnx.split``.
        tasks: in the order of the towers.
        weighting: how much the loss of each task counts.
        optimizer: updates the parameters.
    """

    graph: nnx.GraphDef
    tasks: Sequence[Task]
    weighting: Weighting
    optimizer: optax.GradientTransformation

    def init(self, params: nnx.State) -> TrainerState:
        """The state before the first step.

        Raises:
            UsageError: the model has state other than parameters.
        """
        for path, leaf in nnx.to_flat_state(params):
            if not isinstance(leaf, nnx.Param):
                raise UsageError(
                    f"{path_name(path)} is not a parameter: models cannot have other state here, "
                    "such as statistics or random streams"
                )
        return TrainerState(params, self.optimizer.init(params), self.weighting.init())

    def fit(
        self,
        params: nnx.State,
        train: Data,
        validation: Data | None,
        random: np.random.Generator,
        *,
        batch_size: int,
        max_epochs: int,
        patience: int | float = np.inf,
        on_epoch: Callable[[dict[str, Any]], None] = lambda row: None,
    ) -> tuple[nnx.State, list[dict[str, Any]], int]:
        """Trains until the validation loss no longer falls.

        Args:
            params: at the start.
            validation: None to train for all epochs, the last of which is then the best.
            random: draws the order of the rows.
            patience: epochs without a lower validation loss after which training ends.
            on_epoch: gets the row of the history after each epoch.

        Returns:
            the parameters of the best epoch; the history, for each epoch "epoch", "gates", the mean
            loss of the gates, "train" and "validation", mean losses by name of the task; and the
            number of the best epoch.
        """
        train_epoch, losses_of = jax.jit(self.epoch), jax.jit(self.losses)
        state = self.init(params)
        history: list[dict[str, Any]] = []
        best, kept, at = np.inf, state.params, 0
        for epoch in range(1, max_epochs + 1):
            order = jnp.asarray(batches(random, len(train.labeled[0]), batch_size))
            state, losses = train_epoch(state, train, order)
            row = {"epoch": epoch, "gates": float(losses.gates), "train": self._by_task(losses)}
            loss = -epoch
            if validation is not None:
                row["validation"] = self._by_task(losses_of(state.params, validation))
                loss = float(np.dot(self.weighting.factors, list(row["validation"].values())))
            on_epoch(row)
            history.append(row)
            if loss < best:
                best, kept, at = loss, state.params, epoch
            elif epoch - at >= patience:
                break
        return kept, history, at

    def _by_task(self, losses: Losses) -> dict[str, float]:
        names = [task.name for task in self.tasks]
        return dict(zip(names, np.asarray(losses.tasks).tolist(), strict=True))

    def epoch(
        self, state: TrainerState, data: Data, order: Int[Array, "_ b"]
    ) -> tuple[TrainerState, Losses]:
        """The state after one training step for each batch of an order, and the mean losses.

        Each label counts alike, however many there are of its task in its batch.

        Args:
            order: see ``batches``.
        """
        expected = order.shape[1] * jnp.stack([labeled.mean() for labeled in data.labeled])
        state, each = jax.lax.scan(
            lambda state, rows: self.step(state, take(data, rows), expected), state, order
        )
        losses = mean_of(each)
        weighting = self.weighting.epoch(state.weighting, losses.tasks)
        return state._replace(weighting=weighting), losses

    def step(
        self, state: TrainerState, batch: Data, expected: Float[Array, "t"]
    ) -> tuple[TrainerState, Losses]:
        """The state after a training step, and the losses before it.

        Args:
            expected: the number of labels of each task in a batch that counts as a whole step.
        """

        def every(params: nnx.State) -> tuple[Array, Losses]:
            losses = self._losses(params, batch)
            return jnp.append(losses.tasks, losses.gates), losses

        _, pull_back, losses = jax.vjp(every, state.params, has_aux=True)
        norms = jnp.zeros_like(losses.tasks)
        share = losses.labels / jnp.maximum(expected, 1e-12)
        factors = jnp.append(share * self.weighting.weights(state.weighting), 1.0)
        if self.weighting.needs_norms:
            (each,) = jax.vmap(pull_back)(jnp.eye(len(factors)))
            squares = [jnp.square(x).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(each.body)]
            norms = jnp.sqrt(sum(squares))[:-1]
            gradients = jax.tree.map(lambda x: jnp.tensordot(factors, x, 1), each)
        else:
            (gradients,) = pull_back(factors)
        updates, moments = self.optimizer.update(gradients, state.moments, state.params)
        weighting = self.weighting.step(state.weighting, losses, norms)
        return TrainerState(optax.apply_updates(state.params, updates), moments, weighting), losses

    def losses(self, params: nnx.State, data: Data) -> Losses:
        """The mean losses over all rows, some of which are computed at a time."""
        rows = len(data.labeled[0])
        size = min(rows, EVAL_BATCH_SIZE)
        order = np.arange(-(-rows // size) * size)
        order = np.where(order < rows, order, ~(order % rows)).reshape(-1, size)
        return mean_of(jax.lax.map(lambda rows: self._losses(params, take(data, rows)), order))

    def _losses(self, params: nnx.State, data: Data) -> Losses:
        by_task, _, gates = nnx.merge(self.graph, params).forward(data.inputs)
        sums = [
            jnp.where(labeled, task.loss(outputs, targets), 0.0).sum()
            for task, outputs, targets, labeled in zip(
                self.tasks, by_task.values(), data.targets, data.labeled, strict=True
            )
        ]
        labels = jnp.stack([labeled.sum() for labeled in data.labeled]).astype(jnp.float32)
        return Losses(jnp.stack(sums) / jnp.maximum(labels, 1), gates, labels)


def decayed(params: nnx.State) -> Any:
    """Which parameters weight decay applies to: the kernels of experts, networks and towers.

    It would pull cross-stitch matrices away from the identity, codes of ``DSelectK`` and logits of
    gates to equal weights, and the embedding of a category towards zero at each step without it.

    Returns:
        a mask for ``optax.adamw``.
    """

    def is_decayed(path: tuple[Any, ...], _: Array) -> bool:
        parts = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        return "kernel" in parts and not {"gates", "shared_gate"}.intersection(parts)

    return jax.tree.map_with_path(is_decayed, params)


def batches(random: np.random.Generator, rows: int, size: int) -> Int[np.ndarray, "_ b"]:
    """All rows in random order, in batches.

    Rows that are drawn again fill the last batch. Their targets must not count twice, so they are
    marked as ``~row``.

    Args:
        size: rows of a batch.
    """
    size = min(size, rows)
    order = random.permutation(rows)
    fill = random.permutation(rows)[: -rows % size]
    return np.concatenate([order, ~fill]).reshape(-1, size)


def take(data: Data, order: Int[Array, "b"]) -> Data:
    """Some rows, without the targets of those that are marked as ``~row``."""
    taken = jax.tree.map(lambda x: x[jnp.where(order < 0, ~order, order)], data)
    return taken._replace(labeled=tuple(each & (order >= 0) for each in taken.labeled))


def mean_of(losses: Losses) -> Losses:
    """The mean losses over all batches of an epoch.

    Args:
        losses: with an axis of batches in front.
    """
    labels = losses.labels.sum(0)
    tasks = (losses.tasks * losses.labels).sum(0) / jnp.maximum(labels, 1)
    return Losses(tasks, losses.gates.mean(), labels)


@functools.partial(jax.jit, static_argnums=0)
def forward(graph: nnx.GraphDef, params: nnx.State, inputs: Any) -> Any:
    """``MultiTask.forward``, compiled."""
    return nnx.merge(graph, params).forward(inputs)
