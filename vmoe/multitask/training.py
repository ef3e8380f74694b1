"""Training on arrays in memory."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vmoe.errors import UsageError
from vmoe.multitask.model import MultiTask
from vmoe.multitask.used_rows import Slots, at_matrices, new_slots, used_rows
from vmoe.multitask.weighting import Losses, Weighting
from vmoe.trees import path_name


class Data(NamedTuple):
    """Rows with targets.

    Attributes:
        inputs: the model's inputs, an array or a tree of arrays with an axis b in front.
        targets: the encoded targets (b,) of each task.
        weights: how much a row's target counts, for each task; 0 or False if it has none.
    """

    inputs: Any
    targets: tuple[Any, ...]
    weights: tuple[Float[Array | np.ndarray, "b"] | Bool[Array | np.ndarray, "b"], ...]


EVAL_BATCH_SIZE = 8192  # rows of a forward pass without training
PROGRAMS = 16  # fits of another structure or number of rows whose compiled programs are kept

SCHEDULES: dict[str, optax.Schedule] = {
    "constant": optax.constant_schedule(1.0),
    "cosine": optax.cosine_decay_schedule(1.0, 1),
    "linear": optax.linear_schedule(1.0, 0.0, 1),
}
"""The factor of the learning rate by the share of the steps that are done."""


class Average(NamedTuple):
    """An exponential moving average of the parameters, as ``optax.ema`` but for a new decay.

    Attributes:
        mean: the sum of the parameters after each step, times the weight of the step.
        total: the sum of the weights.
    """

    decay: Float[Array, ""]
    mean: nnx.State
    total: Float[Array, ""]


class TrainerState(NamedTuple):
    """What a training step reads, and mostly changes.

    Attributes:
        params: the parameters, and the random streams of a model that has some.
        moments: the state of the optimizer.
        weighting: the state of the weighting.
        factors: the given factor of each task's loss.
        average: of the parameters; None for none.
    """

    params: nnx.State
    moments: Any
    weighting: Any
    factors: Float[Array, "t"]
    average: Average | None

    @property
    def evaluated(self) -> nnx.State:
        """The parameters to evaluate: their average, if there is one."""
        if self.average is None:
            return self.params
        _, mean, total = self.average
        return nnx.merge_state(self.params, jax.tree.map(lambda x: x / total, mean))


class Epoch(NamedTuple):
    """An epoch of training.

    Attributes:
        state: after it.
        params: those to evaluate, see ``TrainerState``.
        train: the mean losses of its steps.
        validation: the mean losses of the validation rows after it, and their outputs f[b q] by
            task; None without validation rows.
    """

    state: TrainerState
    params: nnx.State
    train: Losses
    validation: tuple[Losses, tuple[Float[Array, "b _"], ...]] | None


@dataclass(frozen=True)
class Trainer:
    """Trains models of one structure.

    All methods but ``epochs`` are functions of arrays: compile them by ``jax.jit``, and map them
    over seeds by ``jax.vmap``. Trainers are equal if their programs are.

    Attributes:
        graph: the structure, see ``nnx.split``.
        losses_of: the loss of each task, in the order of the towers, see ``Task.loss``.
        weighting: how much the loss of each task counts.
        optimizer: updates the parameters.
    """

    graph: nnx.GraphDef
    losses_of: tuple[Callable[[Any, Any], Array], ...]
    weighting: Weighting
    optimizer: optax.GradientTransformation

    def init(
        self, params: nnx.State, factors: Any = None, ema_decay: float | None = None
    ) -> TrainerState:
        """The state before the first step.

        Args:
            params: the state of the model.
            factors: of the tasks' losses (t,); None for 1.
            ema_decay: the decay at each step of an average of the parameters, which is then what is
                evaluated; None for no average.

        Raises:
            UsageError: the model has state other than parameters and random streams.
        """
        for path, leaf in nnx.to_flat_state(params):
            if not isinstance(leaf, nnx.Param | nnx.RngState):
                raise UsageError(
                    f"{path_name(path)} is not a parameter: models cannot have other state here, "
                    "such as statistics"
                )
        tasks = len(self.losses_of)
        moments = self.optimizer.init(nnx.filter_state(params, nnx.Param))
        state = TrainerState(params, moments, self.weighting.init(tasks), jnp.ones(tasks), None)
        return with_settings(state, [1.0] * tasks if factors is None else factors, ema_decay)

    def epochs(
        self,
        state: TrainerState,
        train: Data,
        validation: Data | None,
        random: np.random.Generator,
        batch_size: int,
    ) -> Iterator[Epoch]:
        """Trains for an epoch at a time, without an end.

        Trainers that are equal share their compiled programs for one number of rows.

        Args:
            random: draws the order of the rows.
        """
        rows = [0 if data is None else len(data.weights[0]) for data in (train, validation)]
        train_epoch, evaluate = compiled(self, *rows)
        while True:
            order = jnp.asarray(batches(random, rows[0], batch_size))
            state, losses = train_epoch(state, train, order)
            params = state.evaluated
            evaluated = None if validation is None else evaluate(params, validation)
            yield Epoch(state, params, losses, evaluated)

    def epoch(
        self, state: TrainerState, data: Data, order: Int[Array, "_ b"]
    ) -> tuple[TrainerState, Losses]:
        """The state after one training step for each batch of an order, and the mean losses.

        Each label counts by its weight, however many there are of its task in its batch.

        Args:
            order: see ``batches``.
        """
        expected = order.shape[1] * jnp.stack([weights.mean() for weights in data.weights])
        inputs = nnx.merge(self.graph, state.params).inputs

        def step(
            carry: tuple[TrainerState, Slots, Slots], given: tuple[Array, Int[Array, "b"]]
        ) -> tuple[tuple[TrainerState, Slots, Slots], Losses]:
            (state, slots, last), (number, rows) = carry, given
            batch = take(data, rows)
            used, own, slots = used_rows(inputs, batch.inputs, slots)
            of_used = [each[codes] for each, codes in zip(last, used.codes, strict=False)]
            taken = caught_up(used.take(state), of_used, number)
            after, losses = self.step(taken, batch._replace(inputs=own), expected)
            last = [used.put_matrix(i, each, number + 1) for i, each in enumerate(last)]
            return (used.put(state, averaged(after)), slots, tuple(last)), losses

        slots, steps = new_slots(inputs), len(order)
        last = () if state.average is None else slots  # steps that the average of each row has
        (state, _, last), each = jax.lax.scan(
            step, (state, slots, last), (jnp.arange(steps), order)
        )
        losses = mean_of(each)
        weighting = self.weighting.epoch(state.weighting, losses.tasks)
        return caught_up(state, last, steps)._replace(weighting=weighting), losses

    def step(
        self, state: TrainerState, batch: Data, expected: Float[Array, "t"]
    ) -> tuple[TrainerState, Losses]:
        """The state after a training step but for its average, and the losses before it.

        Args:
            expected: the sum of each task's weights in a batch that counts as a whole step.
        """
        params, streams = nnx.split_state(state.params, nnx.Param, ...)

        def every(params: nnx.State) -> tuple[Array, tuple[Losses, nnx.State]]:
            model = nnx.merge(self.graph, params, streams, copy=True)
            losses, _ = self._losses(model, batch)
            drawn = nnx.state(model, nnx.RngState, graph=True)
            return jnp.append(losses.tasks, losses.gates), (losses, drawn)

        _, pull_back, (losses, streams) = jax.vjp(every, params, has_aux=True)
        norms = jnp.zeros_like(losses.tasks)
        share = losses.labels / jnp.maximum(expected, 1e-12)
        learned = self.weighting.weights(state.weighting)
        factors = jnp.append(share * (state.factors * learned), 1.0)
        if self.weighting.needs_norms:
            (each,) = jax.vmap(pull_back)(jnp.eye(len(factors)))
            squares = [jnp.square(x).reshape(len(x), -1).sum(1) for x in jax.tree.leaves(each.body)]
            norms = jnp.sqrt(sum(squares))[:-1]
            gradients = jax.tree.map(lambda x: jnp.tensordot(factors, x, 1), each)
        else:
            (gradients,) = pull_back(factors)
        updates, moments = self.optimizer.update(gradients, state.moments, params)
        state = state._replace(
            params=nnx.merge_state(optax.apply_updates(params, updates), streams),
            moments=moments,
            weighting=self.weighting.step(state.weighting, losses, norms),
        )
        return state, losses

    def losses(self, params: nnx.State, data: Data) -> Losses:
        """The mean losses over all rows, some of which are computed at a time."""
        return self.evaluate(params, data)[0]

    def evaluate(
        self, params: nnx.State, data: Data
    ) -> tuple[Losses, tuple[Float[Array, "b _"], ...]]:
        """The mean losses over all rows, and the outputs of each task."""
        model = nnx.merge(self.graph, params)
        model.eval()
        rows = len(data.weights[0])
        size = min(rows, EVAL_BATCH_SIZE)
        order = np.arange(-(-rows // size) * size)
        order = np.where(order < rows, order, ~(order % rows)).reshape(-1, size)
        losses, outputs = jax.lax.map(lambda rows: self._losses(model, take(data, rows)), order)
        return mean_of(losses), tuple(x.reshape(-1, x.shape[-1])[:rows] for x in outputs)

    def _losses(
        self, model: MultiTask, data: Data
    ) -> tuple[Losses, tuple[Float[Array, "b _"], ...]]:
        by_task, _, gates = model.forward(data.inputs)
        outputs = tuple(by_task.values())
        sums = [
            jnp.where(weights > 0, weights * loss_of(each, targets), 0.0).sum()
            for loss_of, each, targets, weights in zip(
                self.losses_of, outputs, data.targets, data.weights, strict=True
            )
        ]
        labels = jnp.stack([weights.sum() for weights in data.weights]).astype(jnp.float32)
        tasks = jnp.stack(sums) / jnp.where(labels > 0, labels, 1.0)
        return Losses(tasks, gates, labels), outputs


@functools.lru_cache(maxsize=PROGRAMS)
def compiled(
    trainer: Trainer, train: int, validation: int
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """``Trainer.epoch`` and ``Trainer.evaluate``, compiled once for all trainers that are equal.

    Args:
        train: number of rows. A program for each number would be kept for ever, if these functions
            did not belong to one.
        validation: number of validation rows.
    """
    return jax.jit(trainer.epoch), jax.jit(trainer.evaluate)


def averaged(state: TrainerState) -> TrainerState:
    """A state whose average has the parameters of one step more, if there is one."""
    if state.average is None:
        return state
    decay, mean, total = state.average
    mean = optax.tree.update_moment(nnx.filter_state(state.params, nnx.Param), mean, decay, 1)
    return state._replace(average=Average(decay, mean, decay * total + (1 - decay)))


def caught_up(state: TrainerState, last: Sequence[Array], steps: Any) -> TrainerState:
    """A state whose average has all steps of an epoch in which embeddings did not change.

    Args:
        last: the number of steps that the average of each row has, by matrix; none without an
            average or without matrices.
        steps: the number that it shall have.
    """
    if state.average is None:
        return state
    decay, mean, _ = state.average

    def of_matrix(i: int, rows: Array, mean: Array) -> Array:
        return rows + decay ** (steps - last[i])[:, None] * (mean - rows)

    own = nnx.filter_state(state.params, nnx.Param)
    mean = at_matrices(len(last), of_matrix, own, mean)
    return state._replace(average=state.average._replace(mean=mean))


def with_settings(state: TrainerState, factors: Any, ema_decay: float | None) -> TrainerState:
    """A state with factors and a decay, see ``Trainer.init``; an average that it has continues."""
    state = state._replace(factors=jnp.asarray(factors, jnp.float32))
    if ema_decay is None:
        return state._replace(average=None)
    decay, average = jnp.float32(ema_decay), state.average
    if average is None:
        zeros = jax.tree.map(jnp.zeros_like, nnx.filter_state(state.params, nnx.Param))
        average = Average(decay, zeros, jnp.zeros(()))
    return state._replace(average=average._replace(decay=decay))


@functools.cache
def adamw(schedule: str) -> optax.GradientTransformation:
    """AdamW with a rate of ``SCHEDULES``, whose numbers are arguments of the programs.

    They are ``hyperparams`` of its state: "learning_rate", "weight_decay", and "steps", after which
    the schedule ends. One optimizer is made for a schedule, so that trainers can be equal.
    """

    def of_numbers(
        learning_rate: Any, weight_decay: Any, steps: Any
    ) -> optax.GradientTransformation:
        return optax.adamw(
            lambda count: learning_rate * SCHEDULES[schedule](count / steps),
            weight_decay=weight_decay,
            mask=decayed,
        )

    return optax.inject_hyperparams(of_numbers)(learning_rate=0.0, weight_decay=0.0, steps=1.0)


def with_numbers(
    state: TrainerState, learning_rate: float, weight_decay: float, steps: int
) -> TrainerState:
    """A state with the numbers of ``adamw``."""
    numbers = {"learning_rate": learning_rate, "weight_decay": weight_decay, "steps": steps}
    hyperparams = {name: jnp.float32(value) for name, value in numbers.items()}
    return state._replace(moments=state.moments._replace(hyperparams=hyperparams))


def without_streams(model: MultiTask) -> MultiTask:
    """A model as it is used after training: without dropout and its random streams."""
    model.eval()
    for _, module in nnx.iter_modules(model, graph=True):
        if isinstance(module, nnx.Dropout):
            module.rngs = nnx.data(None)
    return model


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
    return taken._replace(weights=tuple(jnp.where(order < 0, 0, each) for each in taken.weights))


def mean_of(losses: Losses) -> Losses:
    """The mean losses over all batches of an epoch.

    Args:
        losses: with an axis of batches in front.
    """
    labels = losses.labels.sum(0)
    tasks = (losses.tasks * losses.labels).sum(0) / jnp.where(labels > 0, labels, 1.0)
    return Losses(tasks, losses.gates.mean(), labels)


@functools.partial(jax.jit, static_argnums=0)
def forward(graph: nnx.GraphDef, params: nnx.State, inputs: Any) -> Any:
    """``MultiTask.forward``, compiled."""
    return nnx.merge(graph, params).forward(inputs)
