"""Bodies and gates against loops over rows, tasks and experts in float64."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vmoe.config import ExpertList, GatedMlpExpert, MlpExpert, MoEConfig, ZeroExpert
from vmoe.errors import UsageError
from vmoe.multitask import (
    BodyOutput,
    CrossStitch,
    DSelectK,
    MultiGate,
    MultiTask,
    Ple,
    PleLayer,
    SharedBottom,
)
from vmoe.multitask.bodies import Body
from vmoe.multitask.build import ARCHITECTURES, BodyConfig, ReluLayers
from vmoe.multitask.expert_use import equal_experts
from vmoe.nn.experts import Slots
from vmoe.nn.experts.make import make_experts

D, F, T = 5, 4, 2
ROWS = jnp.asarray(np.random.default_rng(0).normal(size=(7, D)), jnp.float32)
Weights = list[tuple[np.ndarray, np.ndarray]]


def linear(layer: nnx.Linear, x: np.ndarray) -> np.ndarray:
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...], np.float64)
    return x @ np.asarray(layer.kernel[...], np.float64) + bias


def softmax(x: np.ndarray) -> np.ndarray:
    return np.exp(x) / np.exp(x).sum()


def make(n: int, rngs: nnx.Rngs, width: int = D) -> list[nnx.Linear]:
    return [nnx.Linear(width, F, rngs=rngs) for _ in range(n)]


def gates(sizes: list[int], rngs: nnx.Rngs, width: int = D) -> list[nnx.Linear]:
    return [nnx.Linear(width, e, rngs=rngs) for e in sizes]


@nnx.jit(graph=True, graph_updates=True)  # tasks can share a gate
def mix(body: Body) -> BodyOutput:
    return body(ROWS)


def test_mmoe_mixes_the_outputs_of_the_experts_by_the_gate_of_each_task() -> None:
    rngs = nnx.Rngs(0)
    experts, of_tasks = make(3, rngs), gates([3, 3], rngs)
    mixed = mix(MultiGate(experts, of_tasks))
    for t, gate in enumerate(of_tasks):
        for b, row in enumerate(np.asarray(ROWS, np.float64)):
            weights = softmax(linear(gate, row))
            expected = sum(w * linear(e, row) for w, e in zip(weights, experts, strict=True))
            np.testing.assert_allclose(mixed.features[t, b], expected, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(mixed.weights[t, b], weights, rtol=1e-5)


def test_cross_stitch_mixes_the_features_of_all_tasks_after_each_layer() -> None:
    rngs = nnx.Rngs(0)
    layers = [make(T, rngs), make(T, rngs, F)]
    body = CrossStitch(layers, own=0.75)
    mixed = mix(body)
    stitch = np.array([[0.75, 0.25], [0.25, 0.75]])
    for b, row in enumerate(np.asarray(ROWS, np.float64)):
        features = np.stack([row] * T)
        for layer in layers:
            each = np.stack([linear(m, x) for m, x in zip(layer, features, strict=True)])
            features = stitch @ each
        np.testing.assert_allclose(mixed.features[:, b], features, rtol=1e-5, atol=1e-5)


def test_ple_gives_a_task_its_own_experts_and_the_shared_ones_layer_after_layer() -> None:
    rngs = nnx.Rngs(0)
    own = [[make(1, rngs), make(2, rngs)], [make(2, rngs, F), make(1, rngs, F)]]
    shared = [make(2, rngs), make(2, rngs, F)]
    of_tasks = [gates([3, 4], rngs), gates([4, 3], rngs, F)]
    shared_gate = nnx.Linear(D, 5, rngs=rngs)
    layers = [
        PleLayer(own[0], shared[0], of_tasks[0], shared_gate),
        PleLayer(own[1], shared[1], of_tasks[1]),
    ]
    mixed = mix(Ple(layers))
    for b, row in enumerate(np.asarray(ROWS, np.float64)):
        inputs, common = [row, row], row
        for layer in range(2):
            all_shared = [linear(e, common) for e in shared[layer]]
            all_own = [[linear(e, x) for e in own[layer][t]] for t, x in enumerate(inputs)]
            weights = [softmax(linear(of_tasks[layer][t], x)) for t, x in enumerate(inputs)]
            inputs = [w @ np.stack([*all_own[t], *all_shared]) for t, w in enumerate(weights)]
            if layer == 0:
                among_all = [*all_own[0], *all_own[1], *all_shared]
                common = softmax(linear(shared_gate, row)) @ np.stack(among_all)
        np.testing.assert_allclose(mixed.features[:, b], np.stack(inputs), rtol=1e-4, atol=1e-5)
        first, second = weights
        np.testing.assert_allclose(mixed.weights[0, b], [*first[:2], 0, *first[2:]], rtol=1e-4)
        np.testing.assert_allclose(mixed.weights[1, b], [0, 0, *second], rtol=1e-4)


def oracle(experts: list[nnx.Linear], gates: list[Any], rows: np.ndarray) -> np.ndarray:
    """The features (t, b, f) of MMoE, from gates as functions of a row to logits."""
    return np.array(
        [
            [softmax(gate(row)) @ np.stack([linear(e, row) for e in experts]) for row in rows]
            for gate in gates
        ]
    )


def test_the_gradient_of_a_gate_is_that_of_the_loop() -> None:
    """By central differences in float64, so that neither its scale nor its sign is free."""
    rngs = nnx.Rngs(0)
    experts, of_tasks = make(3, rngs), gates([3, 3], rngs)
    graph, params = nnx.split(MultiGate(experts, of_tasks), graph=True)

    def loss(features: Any) -> Any:
        return (features**2 * np.arange(1, T + 1)[:, None, None]).sum()

    found = jax.jit(jax.grad(lambda params: loss(nnx.merge(graph, params)(ROWS).features)))(params)
    rows = np.asarray(ROWS, np.float64)
    kernels = [np.asarray(gate.kernel[...], np.float64) for gate in of_tasks]
    biases = [np.asarray(gate.bias[...], np.float64) for gate in of_tasks]
    for t, (i, j) in itertools.product(range(T), np.ndindex(D, 3)):
        moved = []
        for step in (1e-5, -1e-5):
            each = [kernel.copy() for kernel in kernels]
            each[t][i, j] += step
            logits = [lambda row, k=k, b=b: row @ k + b for k, b in zip(each, biases, strict=True)]
            moved.append(loss(oracle(experts, logits, rows)))
        expected = (moved[0] - moved[1]) / 2e-5
        gradient = found["gates"][t]["logits"]["kernel"][...][i, j]
        assert gradient == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_gate_may_have_hidden_layers_and_a_temperature() -> None:
    config = BodyConfig(
        tasks=T, experts=3, units=(F,), gate_units=(6, 2), gate_temperature=0.25, k=2
    )
    body = ARCHITECTURES["mmoe"](config, D, nnx.Rngs(0))
    mixed = mix(body)
    outputs = np.asarray(body.experts.on_same(ROWS))
    for t, gate in enumerate(body.gates):
        for b, row in enumerate(np.asarray(ROWS, np.float64)):
            for layer in gate.hidden.hidden:
                row = np.maximum(linear(layer, row), 0)
            weights = softmax(linear(gate.gate.logits, row) / 0.25)
            np.testing.assert_allclose(mixed.weights[t, b], weights, rtol=1e-4)
            np.testing.assert_allclose(mixed.features[t, b], weights @ outputs[:, b], rtol=1e-4)
    select = config._replace(gate="dselect_k").new_gate(D, 3, nnx.Rngs(0))
    seen = select.hidden(ROWS)
    assert seen.shape == (len(ROWS), 2)
    np.testing.assert_array_equal(select(ROWS).weights, select.gate(seen).weights)


def test_layers_of_ple_need_a_shared_gate_except_the_last() -> None:
    rngs = nnx.Rngs(0)
    with pytest.raises(UsageError, match="all layers but the last need a shared gate"):
        Ple([PleLayer([make(1, rngs)], make(1, rngs), gates([2], rngs)) for _ in range(2)])


def test_dselect_k_multiplies_the_bits_of_the_code_of_an_expert() -> None:
    gate = DSelectK(D, 4, k=2, rngs=nnx.Rngs(0))
    gated = gate(50 * ROWS)  # far enough from 0 that bits differ
    for b, row in enumerate(50 * np.asarray(ROWS, np.float64)):
        z = linear(gate.bits, row).reshape(2, 2)
        step = np.where(z <= -0.5, 0, np.where(z >= 0.5, 1, 0.5 + 1.5 * z - 2 * z**3))
        each = np.array(
            [
                [(s[0] if e & 1 else 1 - s[0]) * (s[1] if e & 2 else 1 - s[1]) for e in range(4)]
                for s in step
            ]
        )
        expected = softmax(linear(gate.selectors, row)) @ each
        np.testing.assert_allclose(gated.weights[b], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gated.weights.sum(1), 1, rtol=1e-5)
    assert gated.loss == 0


def test_trained_selectors_decide_and_a_row_then_uses_at_most_k_experts() -> None:
    """Without entropies in the loss they need not: most rows still use more experts."""
    used = {}
    for entropy_weight in (0.0, 1.0):
        gate = DSelectK(D, 8, k=2, entropy_weight=entropy_weight, rngs=nnx.Rngs(0))
        graph, params = nnx.split(gate, graph=True)

        def loss(params: Any, graph: Any = graph) -> jax.Array:
            gated = nnx.merge(graph, params)(ROWS)
            return jnp.square(gated.weights[:, 3] - 0.5).mean() + gated.loss

        step = jax.jit(jax.grad(loss))
        for _ in range(200):
            params = jax.tree.map(lambda x, g: x - 0.1 * g, params, step(params))
        used[entropy_weight] = (nnx.merge(graph, params)(ROWS).weights > 0.01).sum(1)
    assert (used[1.0] <= 2).all()
    assert (used[0.0] > 2).any()


def test_dselect_k_stays_finite_where_a_selector_chooses_a_code_without_expert() -> None:
    gate = DSelectK(D, 3, k=1, rngs=nnx.Rngs(0))
    graph, params = nnx.split(gate, graph=True)
    value, gradients = jax.jit(
        jax.value_and_grad(lambda params: nnx.merge(graph, params)(1e4 * ROWS).loss)
    )(params)
    assert value > 10  # some rows have p = 0
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients))


def test_dselect_k_moves_weight_to_the_codes_that_have_an_expert() -> None:
    gate = DSelectK(D, 3, k=1, rngs=nnx.Rngs(0))
    graph, params = nnx.split(gate, graph=True)
    loss = jax.jit(jax.value_and_grad(lambda params: nnx.merge(graph, params)(ROWS).loss))
    before, _ = loss(params)
    assert before == pytest.approx(1 / 0.75, rel=0.05)  # three of four codes
    for _ in range(200):
        params = jax.tree.map(lambda x, g: x - 0.05 * g, params, loss(params)[1])
    assert loss(params)[0] == pytest.approx(1, abs=0.01)


def test_dselect_k_gives_one_expert_all_the_weight() -> None:
    gated = DSelectK(D, 1, k=1, rngs=nnx.Rngs(0))(ROWS)
    np.testing.assert_allclose(gated.weights, 1, rtol=1e-6)
    assert gated.loss == 0


def test_more_selectors_than_experts_are_refused() -> None:
    with pytest.raises(UsageError, match="k=4: use 1 to 3, the number of experts"):
        DSelectK(D, 3, k=4, rngs=nnx.Rngs(0))


def built(name: str, tasks: int = T, gate: str = "softmax") -> Body:
    def expert(width: int, *, rngs: nnx.Rngs) -> nnx.Module:
        return ReluLayers(width, (F,), rngs=rngs)

    config = BodyConfig(
        tasks=tasks, experts=3, task_experts=2, units=(F,), layers=2, gate=gate, k=2, expert=expert
    )
    return ARCHITECTURES[name](config, D, nnx.Rngs(0))


def count(module: nnx.Module) -> int:
    return sum(x.size for x in jax.tree.leaves(nnx.state(module, graph=True)))


EXPERT, GATE = D * F + F, D  # parameters of an expert, and of a gate for each expert
SECOND = F * F + F  # of an expert of a second layer


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shared_bottom", EXPERT),
        ("one_gate", 3 * EXPERT + 3 * GATE),
        ("mmoe", 3 * EXPERT + 2 * 3 * GATE),
        ("cross_stitch", 2 * EXPERT + 4),
        ("cgc", 7 * EXPERT + 2 * 5 * GATE),
        ("ple", 7 * EXPERT + (2 * 5 + 7) * GATE + 7 * SECOND + 2 * 5 * F),
        ("esmm", 2 * EXPERT),
        ("aitm", 2 * EXPERT + SECOND + 3 * F * F),
    ],
)
def test_parameters_are_those_that_the_papers_count(name: str, expected: int) -> None:
    assert count(built(name)) == expected


@pytest.mark.long_after(4)
@pytest.mark.parametrize("gate", ["softmax", "dselect_k"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_reach_every_parameter(name: str, gate: str) -> None:
    body = built(name, gate=gate)
    graph, params = nnx.split(body, graph=True)

    def loss(params: Any) -> jax.Array:
        mixed = nnx.merge(graph, params)(ROWS)
        return jnp.sin(mixed.features).sum() + mixed.loss

    gradients = jax.jit(jax.grad(loss))(params)
    for path, gradient in nnx.to_flat_state(gradients):
        axes = tuple(range(1, gradient.ndim)) if "stacked" in path else None
        assert (np.abs(np.asarray(gradient[...])).max(axis=axes) > 0).all(), path


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_experts_of_a_new_model_differ(name: str) -> None:
    for path, value in nnx.to_flat_state(nnx.state(built(name), graph=True)):
        if "stacked" in path and "kernel" in path:
            kernels = np.asarray(value[...])
            assert len(np.unique(kernels, axis=0)) == len(kernels), path


@pytest.mark.parametrize("name", ["one_gate", "mmoe", "cgc"])
def test_one_task_is_a_plain_mixture_of_all_experts(name: str) -> None:
    body = built(name, tasks=1)
    layer = body.layers[0] if name == "cgc" else body
    parts = [*layer.of_tasks, layer.shared] if name == "cgc" else [layer.experts]
    outputs = np.concatenate([np.asarray(experts.on_same(ROWS)) for experts in parts])
    made = mix(body)
    for b, row in enumerate(np.asarray(ROWS, np.float64)):
        weights = softmax(linear(layer.gates[0].logits, row))
        np.testing.assert_allclose(made.features[0, b], weights @ outputs[:, b], rtol=1e-4)


def test_equal_tasks_of_mmoe_are_the_one_gate_mixture_in_training_if_gates_start_equal() -> None:
    """Two gates share the gradient of the one gate, so they get twice the rate."""
    rngs = nnx.Rngs(0)
    experts, gate = make(3, rngs), gates([3], rngs)[0]
    trained = []
    for of_tasks in ([gate, nnx.clone(gate)], [gate, gate]):
        graph, params = nnx.split(nnx.clone(MultiGate(experts, of_tasks), graph=True), graph=True)
        rate = len({id(each) for each in nnx.merge(graph, params).gates})

        def loss(params: Any, graph: Any = graph) -> jax.Array:
            return jnp.square(nnx.merge(graph, params)(ROWS).features - 1).mean()

        def moved(path: Any, x: jax.Array, gradient: jax.Array, rate: int = rate) -> jax.Array:
            return x - 0.1 * gradient * (rate if "gates" in jax.tree_util.keystr(path) else 1)

        step = jax.jit(jax.grad(loss))
        for _ in range(5):
            params = jax.tree.map_with_path(moved, params, step(params))
        trained.append(nnx.merge(graph, params))
    two, one = trained
    for first, second in ((0, 0), (1, 1), (0, 1)):
        np.testing.assert_allclose(
            mix(two).features[first], mix(one).features[second], rtol=1e-5, atol=1e-6
        )
    assert np.abs(mix(one).features - mix(MultiGate(experts, [gate, gate])).features).max() > 0.1
    assert count(one) == 3 * EXPERT + 3 * (D + 1)  # the gate is stored once


def test_numbers_of_experts_gates_and_tasks_that_do_not_fit_get_one_line() -> None:
    rngs = nnx.Rngs(0)
    for e in (1, 5):
        with pytest.raises(UsageError, match=f"a gate has weights for {e} experts, and there are"):
            mix(MultiGate(make(3, rngs), gates([e, e], rngs)))
    with pytest.raises(UsageError, match="there is no gate: give one for each task"):
        MultiGate(make(3, rngs), [])
    with pytest.raises(UsageError, match="experts of 2 tasks and 1 gates: give each task both"):
        PleLayer([make(1, rngs), make(1, rngs)], make(1, rngs), gates([2], rngs))
    with pytest.raises(UsageError, match=r"layers have \[\] modules"):
        CrossStitch([])
    with pytest.raises(UsageError, match=r"layers have \[2, 3\] modules: give each layer one"):
        CrossStitch([make(2, rngs), make(3, rngs, F)])
    with pytest.raises(UsageError, match="all layers but the last need a shared gate"):
        Ple([])


def test_the_loss_of_a_gate_that_tasks_share_counts_once() -> None:
    rngs = nnx.Rngs(0)
    gate = DSelectK(D, 3, k=1, rngs=rngs)
    assert mix(MultiGate(make(3, rngs), [gate, gate])).loss == pytest.approx(gate(ROWS).loss)


def test_a_model_names_its_tasks_and_refuses_another_number_of_towers() -> None:
    rngs = nnx.Rngs(0)
    towers = {"income": nnx.Linear(F, 2, rngs=rngs), "married": nnx.Linear(F, 1, rngs=rngs)}
    model = MultiTask(built("mmoe"), towers)
    assert {k: v.shape for k, v in model(ROWS).items()} == {"income": (7, 2), "married": (7, 1)}
    one = MultiTask(SharedBottom(make(1, rngs)[0], 1), towers)
    with pytest.raises(UsageError, match="the body has 1 tasks, and there are 2 towers"):
        one(ROWS)


def test_experts_of_the_sparse_layer_serve_several_tasks() -> None:
    mixed = ExpertList(each=(GatedMlpExpert(mlp_dim=6), MlpExpert(mlp_dim=6), ZeroExpert()))
    config = MoEConfig(num_experts=3, experts=mixed)
    made = make_experts(config, D, 6, rngs=nnx.Rngs(0))
    zero = nnx.Linear(D, 3, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(1))
    only_third = nnx.clone(zero)
    only_third.bias[...] = jnp.array([-50.0, -50.0, 50.0])
    equal, third = mix(MultiGate(made, [zero, only_third])).features
    outputs = made(jnp.broadcast_to(ROWS, (1, 3, *ROWS.shape)), Slots(1, len(ROWS), {}))[0]
    np.testing.assert_allclose(equal, outputs.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(third, 0, atol=1e-6)


@pytest.mark.parametrize("shared_init", [True, False])
def test_equal_experts_of_the_sparse_layer_are_found(shared_init: bool) -> None:
    config = MoEConfig(num_experts=2, experts=MlpExpert(shared_init=shared_init))
    body = MultiGate(make_experts(config, D, 6, rngs=nnx.Rngs(0)), gates([2, 2], nnx.Rngs(1)))
    found = ["experts 0 of experts and 1 of experts are equal: use different seeds"]
    assert list(equal_experts(body)) == (found if shared_init else [])


def test_equal_experts_of_a_task_and_of_all_are_found() -> None:
    expert = make(1, nnx.Rngs(0))
    layer = PleLayer([expert, make(1, nnx.Rngs(1))], expert, gates([2, 2], nnx.Rngs(2)))
    assert list(equal_experts(layer)) == [
        "experts 0 of of_tasks/0 and 0 of shared are equal: use different seeds"
    ]


def test_modules_that_draw_random_numbers_do_so_in_every_body() -> None:
    def drops() -> nnx.Module:
        return nnx.Sequential(
            nnx.Linear(D, F, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        )

    for body in (
        SharedBottom(drops(), 2),
        MultiGate([drops(), drops()], gates([2, 2], nnx.Rngs(0))),
    ):
        run = nnx.jit(lambda body: body(ROWS).features)
        assert (run(body) != run(body)).any()


def test_experts_that_ask_for_places_of_tokens_are_refused() -> None:
    class Asks(nnx.Module):
        takes = ("positions",)

        def __call__(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
            return tokens

    with pytest.raises(UsageError, match="get rows alone: use experts that do not need positions"):
        MultiGate([Asks()], gates([1], nnx.Rngs(0)))
