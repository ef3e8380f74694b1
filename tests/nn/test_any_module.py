"""Modules as users of Flax write them, as experts: random streams, statistics, shared parameters,
annotated shardings, modules of ``nnx.vmap``; and records under the transformations of Flax."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vmoe.config import MoEConfig, TokenChoice
from vmoe.errors import UsageError
from vmoe.nn.experts import Copies, MixedExperts, StackedMlps, experts_of
from vmoe.nn.moe import MoE, capture_records

B, N, D, E = 2, 6, 8, 4
TOKENS = jnp.float32(np.random.default_rng(0).normal(size=(B, N, D)))
TABLE = np.linspace(0, 1, 16)
ALL = MoEConfig(
    num_experts=E, router=TokenChoice(k=E, noise_std=0.0), dropless=True, images_per_group=B
)
"""Every token goes to every expert."""
TIGHT = MoEConfig(
    num_experts=E,
    router=TokenChoice(k=1, noise_std=0.0),
    capacity=5,
    images_per_group=B,
)


def gate(e: int = E) -> nnx.Linear:
    return nnx.Linear(D, e, use_bias=False, rngs=nnx.Rngs(3))


class Block(nnx.Module):
    """What most feed-forward networks are: linear layers, dropout and a norm with statistics."""

    def __init__(self, rngs: nnx.Rngs, activation: Callable[[jax.Array], jax.Array] = nnx.gelu):
        self.up = nnx.Linear(D, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(16, momentum=0.5, rngs=rngs)
        self.down = nnx.Linear(16, D, rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.norm(self.dropout(self.activation(self.up(x)))))


@nnx.jit
def forward(layer: MoE, tokens: jax.Array) -> jax.Array:
    return layer(tokens)


def test_each_expert_has_masks_and_statistics_of_its_own_as_if_called_alone() -> None:
    """With room for every token each module gets all rows, as it would by itself."""
    rngs = nnx.Rngs(0)
    experts = [Block(rngs) for _ in range(E)]
    alone = [nnx.clone(expert) for expert in experts]
    layer = MoE(experts, gate(), ALL)
    for _ in range(2):
        outputs, record = nnx.jit(MoE.forward)(layer, TOKENS)
        order, chosen, weights = (
            np.asarray(x)[0]
            for x in (record.routing.tokens, record.routing.experts, record.routing.weights)
        )
        expected = np.zeros((B * N, D))
        for i, (module, tokens) in enumerate(zip(alone, order, strict=True)):
            rows = nnx.jit(lambda m, x: m(x))(module, TOKENS.reshape(-1, D)[tokens])
            weight = (weights * (chosen == i)).sum(-1)[tokens]
            expected[tokens] += weight[:, None] * rows
        np.testing.assert_allclose(outputs.reshape(-1, D), expected, atol=1e-5)
    stacked = layer.experts.stacked
    for i, module in enumerate(alone):
        np.testing.assert_allclose(stacked.norm.mean[i], module.norm.mean[...], atol=1e-6)
        assert stacked.dropout.rngs.count[i] == module.dropout.rngs.count[...] == 2
    assert (np.std(stacked.norm.mean[...], axis=0) > 0).all()


def test_copies_of_one_module_draw_different_masks() -> None:
    one, other = (nnx.Dropout(0.5, rngs=nnx.Rngs(i)) for i in range(2))
    layer = MoE([one, one, other, other], gate(), ALL)
    masks = nnx.jit(lambda m, x: m.experts.on_same(x))(layer, jnp.ones((50, D)))
    assert all((masks[i] != masks[j]).any() for i in range(E) for j in range(i))
    first = forward(layer, TOKENS)
    assert (first != forward(layer, TOKENS)).any()


def test_in_evaluation_nothing_changes_and_any_way_of_calling_works() -> None:
    layer = MoE([Block(nnx.Rngs(i)) for i in range(E)], gate(), ALL)
    layer.eval()
    before = jax.tree.map(jnp.copy, nnx.state(layer, nnx.Not(nnx.RngKey)))
    outputs = forward(layer, TOKENS)
    np.testing.assert_array_equal(outputs, jax.jit(layer)(TOKENS))
    jax.tree.map(np.testing.assert_array_equal, before, nnx.state(layer, nnx.Not(nnx.RngKey)))


def test_state_that_would_be_lost_is_refused_in_one_line() -> None:
    layer = MoE([Block(nnx.Rngs(i)) for i in range(E)], gate(), ALL)
    with pytest.raises(UsageError, match=r"Block/\S+ changes: call the layer under nnx.jit"):
        jax.jit(layer)(TOKENS)


class LowRank(nnx.Module):
    """A frozen base that all experts share, and a low-rank part of each."""

    def __init__(self, base: nnx.Linear, rngs: nnx.Rngs):
        self.base = base
        self.lora = nnx.LoRA(D, 2, D, b_initializer=nnx.initializers.normal(), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + self.lora(x)


def test_modules_and_variables_that_experts_share_stay_one() -> None:
    base = nnx.Linear(D, D, rngs=nnx.Rngs(0))
    experts = [LowRank(base, nnx.Rngs(i + 1)) for i in range(E)]
    layer = MoE(experts, gate(), ALL)
    assert layer.experts.stacked.base.kernel is base.kernel
    assert layer.experts.stacked.lora.lora_a.shape == (E, D, 2)
    size = sum(x.size for x in jax.tree.leaves(nnx.state(layer.experts)))
    assert size == D * D + D + E * 2 * D * 2

    @nnx.jit
    def gradients(layer: MoE) -> Any:
        return nnx.grad(lambda layer: (layer(TOKENS) ** 2).sum())(layer)

    # the oracle: a sum over modules that are called one by one
    def loss(model: tuple[nnx.Linear, list[LowRank]]) -> jax.Array:
        logits = model[0](TOKENS)
        rows = jnp.stack([expert(TOKENS) for expert in model[1]], -1)
        return ((rows * jax.nn.softmax(logits)[..., None, :]).sum(-1) ** 2).sum()

    ours = gradients(layer)["experts"]["stacked"]
    graph, state = nnx.split(nnx.List([gate(), nnx.List(experts)]))
    oracle = jax.grad(lambda s: loss(tuple(nnx.merge(graph, s))))(state)
    np.testing.assert_allclose(
        ours["base"]["kernel"][...], oracle[1][0]["base"]["kernel"][...], rtol=1e-4, atol=1e-5
    )
    for i in range(E):
        np.testing.assert_allclose(
            ours["lora"]["lora_a"][i], oracle[1][i]["lora"]["lora_a"][...], rtol=1e-4, atol=1e-5
        )


class Holding(nnx.Module):
    """Holds something that is no variable."""

    def __init__(self, held: Any):
        self.held = held

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


class Sowing(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        features = self.linear(x)
        self.sow(nnx.Intermediate, "features", features)
        return features


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_modules_may_hold_anything_and_sow() -> None:
    held = (jnp.ones(D), np.ones(D), nnx.Variable(0), {"a": 1}, [1, 2], {1, 2})
    for each in held:
        layer = MoE([Holding(each) for _ in range(E)], gate(), ALL)
        np.testing.assert_allclose(forward(layer, TOKENS), TOKENS, rtol=1e-5)
    layer = MoE([Sowing(nnx.Rngs(i)) for i in range(E)], gate(), ALL)
    outputs = forward(layer, TOKENS)
    again, sown = nnx.capture(layer, nnx.Intermediate)(TOKENS)
    np.testing.assert_allclose(outputs, again, rtol=1e-5, atol=1e-6)
    assert sown["experts"]["stacked"]["features"][0].shape == (E, B * N, D)


def test_what_some_experts_share_stays_theirs() -> None:
    bases = [nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(2)]
    experts = [LowRank(bases[i % 2], nnx.Rngs(i)) for i in range(E)]
    with pytest.warns(UserWarning, match="experts 0 and 1 are both LowRank .* one after another"):
        layer = MoE(experts, gate(), ALL)
    for kind, base in zip(layer.experts.kinds, bases, strict=True):
        assert kind.stacked.base.kernel is base.kernel
    rows = TOKENS.reshape(-1, D)
    expected = np.stack([expert(rows) for expert in experts])
    np.testing.assert_allclose(layer.experts.on_same(rows), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="share base/bias with some of the others only: use exp"):
        Copies(experts)


class Unit(nnx.Module):
    """Not finite at zero; with parameters, so that a gradient shows it."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(D, D, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.linear(x / jnp.linalg.norm(x, axis=-1, keepdims=True))


@pytest.mark.parametrize("padded", [False, True])
def test_a_module_that_is_not_finite_at_zero_has_finite_gradients(padded: bool) -> None:
    """Empty slots hold a real row, also in a group that is only padding."""
    layer = MoE([Unit(nnx.Rngs(i)) for i in range(E)], gate(), TIGHT)
    valid = jnp.array([not padded] * B)
    tokens = jnp.where(valid[:, None, None], TOKENS, 0.0)

    @nnx.jit
    def gradients(layer: MoE) -> Any:
        return nnx.grad(lambda layer: (layer(tokens, valid=valid) ** 2).sum())(layer)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients(layer)))
    record = capture_records(layer, tokens, valid=valid)[1][()][0]
    assert (np.asarray(record.routing.tokens) == B * N).any()  # empty slots


class Scaled(nnx.Module):
    """Its argument has a name by which others get the number of tokens."""

    def __call__(self, x: jax.Array, s: float = 1.0, n: int = 1) -> jax.Array:
        return x * s * n


def test_arguments_of_an_expert_keep_their_defaults_whatever_their_names() -> None:
    layer = MoE([Scaled()] * E, gate(), ALL)
    np.testing.assert_allclose(forward(layer, TOKENS), TOKENS, rtol=1e-5)


def test_an_expert_that_asks_for_what_no_layer_has_is_refused_by_name() -> None:
    class Wrong(Scaled):
        takes = ("position",)

    with pytest.raises(UsageError, match="Wrong.takes names position: a layer has filled, images"):
        MoE([Wrong()] * E, gate())


def test_the_axis_of_experts_comes_first_in_annotated_shardings() -> None:
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        experts = [nnx.Linear(D, D, kernel_init=init, rngs=nnx.Rngs(i)) for i in range(E)]
        layer = MoE(experts, gate())
        assert np.isfinite(forward(layer, TOKENS)).all()
    kernel = layer.experts.stacked.kernel
    assert kernel.shape == (E, D, D)
    assert kernel.get_metadata()["out_sharding"] == (None, None, "model")
    assert experts[0].kernel.get_metadata()["out_sharding"] == (None, "model")


def test_a_module_of_nnx_vmap_is_the_experts() -> None:
    @nnx.split_rngs(splits=E)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> nnx.Linear:
        return nnx.Linear(D, D, rngs=rngs)

    made = make(nnx.Rngs(0))
    layer = MoE(made, gate(), ALL)
    graph, state = nnx.split(made)
    ones = [nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state)) for i in range(E)]
    np.testing.assert_allclose(
        forward(layer, TOKENS), forward(MoE(ones, gate(), ALL), TOKENS), rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UsageError, match="experts is one Linear, whose variables need an axis of"):
        MoE(nnx.Linear(D, 5, rngs=nnx.Rngs(0)), gate())


def test_equal_modules_are_computed_at_once_in_any_order() -> None:
    def mlp(i: int) -> Block:
        return Block(nnx.Rngs(i), functools.partial(jax.nn.gelu, approximate=False))

    def linear(i: int) -> nnx.Linear:
        return nnx.Linear(D, D, rngs=nnx.Rngs(i))

    modules = [(mlp if i % 2 else linear)(i) for i in range(6)]
    for module in modules:
        module.eval()
    experts = experts_of(modules)
    assert isinstance(experts, MixedExperts) and len(experts.kinds) == 2
    rows = TOKENS.reshape(-1, D)
    expected = np.stack([module(rows) for module in modules])
    np.testing.assert_allclose(experts.on_same(rows), expected, rtol=1e-4, atol=1e-5)
    layer = MoE(experts, gate(6), TokenChoice(k=1, normalize_weights=True))
    outputs, record = nnx.jit(MoE.forward)(layer, TOKENS)
    chosen = np.asarray(record.routing.experts)[0, :, 0]
    kept = np.asarray(record.routing.kept)[0]
    by_hand = expected[chosen, np.arange(B * N)] * kept
    np.testing.assert_allclose(outputs.reshape(-1, D), by_hand, rtol=1e-4, atol=1e-5)


def recursive() -> Callable[..., jax.Array]:
    def apply(x: jax.Array, depth: int = 0) -> jax.Array:
        return nnx.relu(x) if depth else apply(x, 1)

    return apply


def test_functions_of_equal_code_make_no_kinds_and_others_are_said() -> None:
    for make in (
        lambda: functools.partial(nnx.leaky_relu, negative_slope=0.1),
        lambda: lambda x: nnx.relu(x) ** 2,
        lambda: lambda x: x * TABLE,
        recursive,
    ):
        modules = [Block(nnx.Rngs(i), make()) for i in range(E)]
        assert isinstance(experts_of(modules), Copies)
    for functions in (
        [lambda x, i=i: x**i for i in range(2)],
        [lambda x, *, i=i: x**i for i in range(2)],
    ):
        powers = [Block(nnx.Rngs(i), function) for i, function in enumerate(functions)]
        with pytest.warns(UserWarning, match="experts 0 and 1 are both Block with variables of eq"):
            assert len(experts_of(powers).kinds) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # experts of other sizes are meant to differ
        experts_of([nnx.Linear(D, D, rngs=nnx.Rngs(0)), nnx.Linear(D, 2, rngs=nnx.Rngs(0))])


def test_all_shared_experts_are_added_and_padding_stays_zero() -> None:
    layer = MoE([Scaled()] * E, gate(), ALL, shared=StackedMlps(2, D, 5, rngs=nnx.Rngs(0)))
    valid = jnp.array([True, False])
    outputs = nnx.jit(lambda layer, x: layer(x, valid=valid))(layer, TOKENS)
    both = np.asarray(layer.shared.on_same(jnp.asarray(TOKENS.reshape(-1, D)))).sum(0)
    expected = (TOKENS.reshape(-1, D) + both).reshape(TOKENS.shape)
    np.testing.assert_allclose(outputs[0], expected[0], rtol=1e-4, atol=1e-5)
    assert (outputs[1] == 0).all()


def test_a_list_of_flax_is_a_list() -> None:
    modules = [nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(E)]
    same = (forward(MoE(each, gate(), ALL), TOKENS) for each in (modules, nnx.List(modules)))
    np.testing.assert_array_equal(next(same), next(same))


class Stack(nnx.Module):
    """Two layers, called in a way of its own; their experts are nested lists of modules."""

    def __init__(self, way: str, count: int = 2):
        def make(rngs: nnx.Rngs) -> MoE:
            linear = functools.partial(nnx.Linear, D, rngs=rngs)
            experts = [nnx.Sequential(linear(D), nnx.tanh, linear(D)) for _ in range(E)]
            return MoE(experts, linear(E, use_bias=False), TIGHT)

        self.way = way
        if way in ("scan", "vmap"):
            self.layers = nnx.split_rngs(splits=count)(nnx.vmap(make))(nnx.Rngs(0))
        else:
            self.layers = nnx.List([make(nnx.Rngs(i)) for i in range(count)])

    def __call__(self, x: jax.Array) -> jax.Array:
        match self.way:
            case "scan":
                return nnx.scan(
                    lambda x, layer: x + layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
                )(x, self.layers)
            case "vmap":
                return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.layers, x).sum(0)
            case "remat":
                for layer in self.layers:
                    x = x + nnx.remat(lambda layer, x: layer(x))(layer, x)
                return x
        for layer in self.layers:
            x = x + layer(x)
        return x


@pytest.mark.parametrize("way", ["plain", "remat", "scan", "vmap"])
def test_records_are_reached_under_the_transformations_of_flax(way: str) -> None:
    model = Stack(way)

    @nnx.jit
    def step(model: Stack) -> Any:
        def loss(model: Stack) -> Any:
            outputs, records = capture_records(model, TOKENS)
            aux = sum(record.aux_loss.sum() for calls in records.values() for record in calls)
            return (outputs**2).mean() + aux, records

        return nnx.value_and_grad(loss, has_aux=True)(model)

    (_, records), gradients = step(model)
    losses = [record.aux_loss for calls in records.values() for record in calls]
    shapes = {"scan": [(2,)], "vmap": [(2,)]}.get(way, [(), ()])
    assert [loss.shape for loss in losses] == shapes
    assert np.concatenate([np.ravel(loss) for loss in losses]).min() > 0
    for path, x in nnx.to_flat_state(gradients):
        assert np.asarray(x[...]).any(), path
