"""Training steps change those embeddings alone that a batch uses."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import pytest
from flax import nnx

from vmoe.multitask import MultiTask, SharedBottom
from vmoe.multitask.columns import TableEncoder, TableRows
from vmoe.multitask.tasks import Regression
from vmoe.multitask.training import Data, Trainer
from vmoe.multitask.weighting import Weighting
from vmoe.trees import by_name


@pytest.mark.parametrize("size", [3, pytest.param(12, marks=pytest.mark.slow)])
def test_an_epoch_is_a_loop_of_dense_steps_after_which_unused_rows_are_put_back(size: int) -> None:
    # batches of 3 rows have fewer codes than the matrices have rows, batches of 12 have more
    random = np.random.default_rng(0)
    rows, every = 24, np.ones(24, bool)
    frame = pd.DataFrame({name: random.integers(0, 9, rows).astype(str) for name in "abc"})
    frame["few"] = [["x", "y", "x"], [], ["z"], None] * 6
    encoder = TableEncoder(embedding_size={"a": 3, "b": 3, "c": 2, "few": 2})
    table = jax.device_put(encoder.fit_transform(frame))
    rngs = nnx.Rngs(0)
    inputs = TableRows(encoder, rngs=rngs)
    body = SharedBottom(nnx.Linear(inputs.width, 4, rngs=rngs), 1)
    model = MultiTask(body, {"sum": nnx.Linear(4, 1, rngs=rngs)}, inputs)
    graph, params = nnx.split(model, graph=True)
    y = random.normal(size=rows)
    task = Regression("sum", y, every)
    data = Data(table, (jnp.asarray(task.encode(y, every)),), (jnp.asarray(every),))
    optimizer = optax.adamw(0.1, weight_decay=0.3)
    trainer = Trainer(graph, (Regression.loss,), Weighting(), optimizer)
    order = random.permutation(rows).reshape(-1, size)
    start = trainer.init(params, ema_decay=0.8)
    state, _ = jax.jit(trainer.epoch)(start, data, jnp.asarray(order))
    # no step computes with a whole matrix that is large, for the average neither
    program = jax.make_jaxpr(trainer.epoch)(start, data, jnp.asarray(order))
    (loop,) = (each.params["jaxpr"] for each in program.eqns if each.primitive.name == "scan")
    whole = inputs.vectors[0].embedding.shape
    assert f"f32[{whole[0]},{whole[1]}]" in str(loop)
    assert (f"f32[{whole[0]},{whole[1]}] = mul" in str(loop)) == (size == 12)

    def loss(params: nnx.State, batch: Data) -> jax.Array:
        outputs = nnx.merge(graph, params)(batch.inputs)["sum"]
        return jnp.square(outputs[:, 0] - batch.targets[0]).mean()

    dense_step = jax.jit(lambda p, m, batch: optimizer.update(jax.grad(loss)(p, batch), m, p))
    moments = optimizer.init(params)
    average = optax.ema(0.8)
    mean, averages = params, average.init(params)
    for batch in order:
        given = jax.tree.map(lambda x, batch=batch: x[batch], data)
        used = [set(), set()]  # of the matrices of size 3 and 2
        used[0].update(np.asarray(given.inputs.codes)[:, :2].ravel().tolist())
        used[1].update(np.asarray(given.inputs.codes)[:, 2].tolist())
        used[1].update(code for code in np.asarray(given.inputs.lists[0]).ravel().tolist())
        updates, after = dense_step(params, moments, given)
        after = (optax.apply_updates(params, updates), after)
        unused = [[i for i in range(99) if i not in each] for each in used]

        def put_back(path, new, old, unused=unused):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            for matrix in (0, 1):
                if f"vectors/{matrix}/embedding" in name:
                    keep = np.array([i for i in unused[matrix] if i < len(new)], int)
                    return new.at[keep].set(old[keep])
            return new

        params, moments = jax.tree.map_with_path(put_back, after, (params, moments))
        mean, averages = average.update(params, averages)
    for one, two in ((state.params, params), (state.moments, moments), (state.evaluated, mean)):
        one, two = by_name(one), by_name(two)
        assert one.keys() == two.keys()
        for name, each in one.items():
            np.testing.assert_allclose(each, two[name], rtol=2e-4, atol=1e-6, err_msg=name)


class Vectors(nnx.Module):
    """Adds an embedding of the sign of the first number; it has the paths of ``TableRows``."""

    def __init__(self, width: int, rngs: nnx.Rngs):
        self.vectors = nnx.List([nnx.Embed(2, width, rngs=rngs)])

    def __call__(self, rows: Any) -> Any:
        return rows + self.vectors[0]((rows[:, 0] > 0).astype(int))


class Named(nnx.Module):
    """An expert whose part has the name that a model gives to its inputs, or another."""

    def __init__(self, name: str, width: int, rngs: nnx.Rngs):
        self.name = name
        setattr(self, name, Vectors(width, rngs))

    def __call__(self, rows: Any) -> Any:
        return getattr(self, self.name)(rows)


def test_modules_of_users_with_the_paths_of_the_inputs_are_trained_as_a_whole() -> None:
    random, every = np.random.default_rng(0), jnp.ones(24, bool)
    frame = pd.DataFrame({"x": random.normal(size=24), "a": random.integers(0, 9, 24).astype(str)})
    encoder = TableEncoder()
    table = jax.device_put(encoder.fit_transform(frame))
    order = jnp.arange(24).reshape(2, 12)

    def trained(name: str, inputs: Any, given: Any, width: int) -> list[jax.Array]:
        rngs = nnx.Rngs(0)
        body = SharedBottom(Named(name, width, rngs), 1)
        model = MultiTask(body, {"sum": nnx.Linear(width, 1, rngs=rngs)}, inputs)
        graph, params = nnx.split(model, graph=True)
        trainer = Trainer(graph, (Regression.loss,), Weighting(), optax.adam(0.1))
        data = Data(given, (table.numbers[:, 0],), (every,))
        state, _ = jax.jit(trainer.epoch)(trainer.init(params), data, order)
        return jax.tree.leaves(state)

    for inputs, given, width in (
        (TableRows(encoder, rngs=nnx.Rngs(1)), table, 9),
        (Vectors(1, nnx.Rngs(1)), table.numbers, 1),
    ):
        leaves = [trained(name, inputs, given, width) for name in ("inputs", "part")]
        for one, other in zip(*leaves, strict=True):
            np.testing.assert_array_equal(one, other)
