"""Modules as users of Flax write them, as experts: random streams, statistics, shared parameters,
annotated shardings, modules of ``nnx.vmap``; and records under the transformations of Flax."""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vmoe.config import (
    BiasBalanced,
    Exchange,
    ExpertChoice,
    ExpertList,
    GatedMlpExpert,
    IdentityExpert,
    MlpExpert,
    MoEConfig,
    Router,
    Soft,
    TokenChoice,
    replace,
)
from vmoe.errors import UsageError
from vmoe.nn.experts import Copies, MixedExperts, StackedMlps, experts_of
from vmoe.nn.moe import MoE, capture_records

B, N, D, E = 2, 6, 8, 4
TOKENS = jnp.float32(np.random.default_rng(0).normal(size=(B, N, D)))
ALL = TokenChoice(k=E, noise_std=0.0, dropless=True)
"""Every token goes to every expert."""
OF_TWO = replace(ALL, k=2)
TIGHT = TokenChoice(k=1, noise_std=0.0, capacity=5)


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


@nnx.jit
def on_same(experts: Any, rows: jax.Array) -> jax.Array:
    return experts.on_same(rows)


def test_each_expert_has_masks_and_statistics_of_its_own_as_if_called_alone() -> None:
    """With room for every token each module gets all rows, as it would by itself."""
    rngs = nnx.Rngs(0)
    layer = MoE([Block(rngs) for _ in range(E)], gate(), ALL)
    alone, call = [layer.experts[i] for i in range(E)], nnx.jit(lambda m, x: m(x))
    for _ in range(2):
        outputs, record = nnx.jit(MoE.forward)(layer, TOKENS)
        order, chosen, weights = (
            np.asarray(x)[0]
            for x in (record.routing.tokens, record.routing.experts, record.routing.weights)
        )
        expected = np.zeros((B * N, D))
        for i, (module, tokens) in enumerate(zip(alone, order, strict=True)):
            rows = call(module, TOKENS.reshape(-1, D)[tokens])
            weight = (weights * (chosen == i)).sum(-1)[tokens]
            expected[tokens] += weight[:, None] * rows
        np.testing.assert_allclose(outputs.reshape(-1, D), expected, atol=1e-5)
    stacked = layer.experts.stacked
    for i, module in enumerate(alone):
        np.testing.assert_allclose(stacked.norm.mean[i], module.norm.mean[...], atol=1e-6)
        assert stacked.dropout.rngs.count[i] == module.dropout.rngs.count[...] == 2
    assert (np.std(stacked.norm.mean[...], axis=0) > 0).all()


class Masking(nnx.Module):
    """Draws from the streams with which it was made, and which other modules hold too."""

    def __init__(self, rngs: nnx.Rngs):
        self.rngs = rngs

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jax.random.bernoulli(self.rngs.dropout(), 0.5, x.shape)


class Halving(Masking):
    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) / 2


def dropout() -> list[nnx.Module]:
    one, other = (nnx.Dropout(0.5, rngs=nnx.Rngs(i)) for i in range(2))
    return [one, one, other, nnx.clone(other), nnx.clone(other)]


def of_one_stream() -> list[nnx.Module]:
    rngs = nnx.Rngs(dropout=0)
    return [Masking(rngs), Halving(rngs), Masking(rngs), Halving(rngs), Masking(rngs)]


@pytest.mark.parametrize("make", [dropout, of_one_stream])
def test_every_expert_of_a_layer_draws_masks_of_its_own(make: Callable[[], Any]) -> None:
    """Copies of one module, modules of one stream, and the shared expert."""
    *experts, shared = make()
    layer = MoE(experts, gate(), ALL, shared=shared)

    @nnx.jit
    def masks_of(layer: MoE) -> jax.Array:
        rows = jnp.ones((50, D))
        return jnp.concatenate([layer.experts.on_same(rows), layer.shared.on_same(rows)])

    masks = masks_of(layer) > 0
    assert all((masks[i] != masks[j]).any() for i in range(E + 1) for j in range(i))
    assert (masks != (masks_of(layer) > 0)).any()


def test_streams_that_a_module_has_split_stay_split() -> None:
    class Two(nnx.Module):
        def __init__(self) -> None:
            streams = nnx.split_rngs(splits=2)(nnx.vmap(lambda rngs: nnx.Dropout(0.5, rngs=rngs)))
            self.both = streams(nnx.Rngs(0))

        def __call__(self, x: jax.Array) -> jax.Array:
            return nnx.vmap(lambda dropout, x: dropout(x), in_axes=(0, None))(self.both, x).sum(0)

    layer = MoE([Two(), Two()], gate(2), TokenChoice(k=1))
    one, other = nnx.jit(lambda layer, x: layer.experts.on_same(x))(layer, jnp.ones((50, D)))
    assert (one != other).any()
    assert set(np.unique(one)) == {0.0, 2.0, 4.0}  # each row by both masks, which differ


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
    oracle = jax.jit(jax.grad(lambda s: loss(tuple(nnx.merge(graph, s)))))(state)
    np.testing.assert_allclose(
        ours["base"]["kernel"][...], oracle[1][0]["base"]["kernel"][...], rtol=1e-4, atol=1e-5
    )
    for i in range(E):
        np.testing.assert_allclose(
            ours["lora"]["lora_a"][i], oracle[1][i]["lora"]["lora_a"][...], rtol=1e-4, atol=1e-5
        )


class BaseGate(nnx.Module):
    """Logits from the base of the experts."""

    def __init__(self, base: nnx.Linear):
        self.base = base

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x)[..., :E]


class Model(nnx.Module):
    def __init__(self, layer: MoE, head: nnx.Module):
        self.layer, self.head = layer, head


def test_what_experts_share_with_the_gate_the_shared_expert_or_a_head_stays_one() -> None:
    """Also if one expert alone holds it: a gradient is the sum over all places."""
    base, rngs = nnx.Linear(D, D, rngs=nnx.Rngs(0)), nnx.Rngs(1)
    experts = [LowRank(base, rngs), *(nnx.Linear(D, D, rngs=rngs) for _ in range(E - 1))]
    shared = LowRank(base, rngs)
    layer = MoE(experts, BaseGate(base), ALL, shared=shared)
    assert layer.experts[0].base.kernel is base.kernel is layer.shared.stacked.base.kernel
    assert layer.gate.base.kernel is base.kernel

    def loss(gate: Any, experts: Sequence[Any], shared: Any) -> jax.Array:
        rows = jnp.stack([expert(TOKENS) for expert in experts], -1)
        y = (rows * jax.nn.softmax(gate(TOKENS))[..., None, :]).sum(-1) + shared(TOKENS)
        return (y**2).sum()

    ours = nnx.jit(nnx.grad(lambda layer: (layer(TOKENS) ** 2).sum()))(layer)
    graph, state = nnx.split(nnx.List([BaseGate(base), nnx.List(experts), shared]))
    oracle = jax.jit(jax.grad(lambda s: loss(*nnx.merge(graph, s))))(state)
    np.testing.assert_allclose(
        ours["experts"]["kinds"][0]["stacked"]["base"]["kernel"][...],
        oracle[0]["base"]["kernel"][...],
        rtol=1e-4,
        atol=1e-4,
    )
    by_two = MoE([LowRank(base, rngs) for _ in range(E)], gate(), ALL)
    sizes = [x.size for x in jax.tree.leaves(nnx.state(Model(by_two, base), nnx.Param))]
    assert sum(sizes) == D * D + D + E * 2 * D * 2 + D * E
    by_hand = experts_of([experts[0]] * E, beside=[base])  # what a head alone holds too is named
    assert by_hand.stacked.base.kernel is base.kernel


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
    again, sown = nnx.jit(lambda m, x: nnx.capture(m, nnx.Intermediate)(x))(layer, TOKENS)
    np.testing.assert_allclose(outputs, again, rtol=1e-5, atol=1e-6)
    assert sown["experts"]["stacked"]["features"][0].shape == (E, B * N, D)


def test_what_some_experts_share_stays_theirs() -> None:
    bases = [nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(2)]
    experts = [LowRank(bases[i % 2], nnx.Rngs(i)) for i in range(E)]
    message = "experts 0 and 1 are both LowRank .* differ in base/bias: 2 kinds are computed one af"
    with pytest.warns(UserWarning, match=message):
        layer = MoE(experts, gate(), ALL)
    for kind, base in zip(layer.experts.kinds, bases, strict=True):
        assert kind.stacked.base.kernel is base.kernel
    rows = TOKENS.reshape(-1, D)
    expected = np.stack([expert(rows) for expert in experts])
    np.testing.assert_allclose(layer.experts.on_same(rows), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UsageError, match="experts 0 and 1 differ in base/bias, so .* use experts"):
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
    mask = jnp.full((B, N), not padded)
    tokens = jnp.where(mask[..., None], TOKENS, 0.0)

    @nnx.jit
    def gradients(layer: MoE) -> Any:
        return nnx.grad(lambda layer: (layer(tokens, mask=mask) ** 2).sum())(layer)

    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradients(layer)))
    record = nnx.jit(MoE.forward)(layer, tokens, mask=mask)[1]
    assert (np.asarray(record.routing.tokens) == B * N).any()  # empty slots


class Scaled(nnx.Module):
    """Its arguments have names of what others get, and of the parts of a layer."""

    def __call__(
        self, x: jax.Array, s: float = 1.0, n: int = 1, rows: float = 1.0, groups: float = 1.0
    ) -> jax.Array:
        return x * s * n * rows * groups


@pytest.mark.parametrize("names", ["key", ["key"], ("key", 1), None, ("position",)])
def test_what_an_expert_takes_is_a_tuple_of_names_that_a_layer_has(names: Any) -> None:
    class Wrong(Scaled):
        takes = names

    message = r"Wrong.takes is .*: use a tuple of names, such as \('key',\)"
    if names == ("position",):
        message = "Wrong.takes names position: a layer has filled, images"
    with pytest.raises(UsageError, match=message):
        MoE([Wrong()] * E, gate())


class Sized(nnx.Module):
    takes = ("n",)

    def __call__(self, x: jax.Array, *, n: int) -> jax.Array:
        return x * n


class Around(nnx.Module):
    """Calls a module that takes something, in a way of its own."""

    takes = ()

    def __init__(self, inside: nnx.Module):
        self.inside = inside

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.inside(x, n=2)


def test_a_module_around_one_that_takes_something_says_what_it_takes_itself() -> None:
    for around, path in (
        (nnx.Sequential(Sized(), nnx.tanh), "layers/0"),
        (Holding(nnx.List([nnx.Sequential(Scaled(), Sized())])), "held/0/layers/1"),
    ):
        message = f"holds {path}, which takes n: give {type(around).__name__} the same `takes` to"
        with pytest.raises(UsageError, match=message):
            MoE([around] * E, gate())
    layer = MoE([Around(Sized())] * E, gate(), ALL)
    np.testing.assert_allclose(forward(layer, TOKENS), 2 * TOKENS, rtol=1e-5)
    inner = MoE([Sized()] * 2, gate(2), OF_TWO)
    layer = MoE([nnx.Sequential(inner, nnx.identity)] * E, gate(), ALL)  # a layer is no such module
    assert forward(layer, TOKENS).shape == TOKENS.shape


def test_only_names_that_an_expert_takes_are_refused_as_inputs() -> None:
    layer = MoE([Scaled()] * E, gate(), ALL)
    ours, by_default = nnx.jit(
        lambda layer, x: (layer(x, s=2.0, n=3, rows=5.0, groups=7.0), layer(x))
    )(layer, TOKENS)
    np.testing.assert_allclose(ours, 210 * TOKENS, rtol=1e-5)
    np.testing.assert_allclose(by_default, TOKENS, rtol=1e-5)
    scale = jnp.arange(1.0, B * N + 1).reshape(B, N, 1)
    scaled = nnx.jit(lambda layer, x: layer(x, n=2, per_token={"s": scale}))(layer, TOKENS)
    np.testing.assert_allclose(scaled, 2 * scale * TOKENS, rtol=1e-5)
    with pytest.raises(UsageError, match="^s is given per token and for all: give one of them an"):
        layer(TOKENS, s=2.0, per_token={"s": scale})


def test_kinds_of_experts_get_what_they_ask_for_and_the_inputs_of_the_caller() -> None:
    class Positions(nnx.Module):
        takes = ("positions",)

        def __call__(self, x: jax.Array, *, positions: jax.Array, images: jax.Array) -> jax.Array:
            return x * positions[..., None] + images

    class Images(nnx.Module):
        def __call__(self, x: jax.Array, images: jax.Array) -> jax.Array:
            return x + images

    images = jnp.arange(1.0, B * N + 1).reshape(B, N, 1)
    layer = MoE([Positions(), Images()], gate(2), OF_TWO)
    outputs, record = nnx.jit(lambda layer, x: layer.forward(x, per_token={"images": images}))(
        layer, TOKENS
    )
    gates = record.gates.reshape(B, N, 2)
    positions = jnp.arange(N)[None, :, None]
    expected = TOKENS * (gates[..., :1] * positions + gates[..., 1:]) + images
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.long_after(3)
@pytest.mark.parametrize("kind", ["copies", "mixed", "mlps", "config", "vmap", "base", "annotated"])
def test_one_expert_is_a_module_of_its_own(kind: str) -> None:
    """Its outputs are those of the layer; what is done to it changes nothing in the layer."""
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), (None, "model"))
    base, rngs = nnx.Linear(D, D, rngs=nnx.Rngs(9)), nnx.Rngs(0)
    each = (MlpExpert(), MlpExpert(), GatedMlpExpert(), IdentityExpert())
    config = MoEConfig(num_experts=E, experts=ExpertList(each=each))
    made: dict[str, Callable[[], Any]] = {
        "copies": lambda: nnx.List([nnx.Linear(D, D, rngs=rngs) for _ in range(E)]),
        "mixed": lambda: [nnx.Linear(D, D, use_bias=i % 2 == 0, rngs=rngs) for i in range(E)],
        "mlps": lambda: StackedMlps(E, D, 5, shared_init=False, rngs=rngs),
        "config": lambda: MoE.from_config(config, D, 5, N, rngs=rngs).experts,
        "vmap": lambda: nnx.split_rngs(splits=E)(
            nnx.vmap(lambda rngs: nnx.Linear(D, D, rngs=rngs))
        )(rngs),
        "base": lambda: [LowRank(base, rngs) for _ in range(E)],
        "annotated": lambda: [nnx.Linear(D, D, kernel_init=init, rngs=rngs) for _ in range(E)],
    }
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    with jax.set_mesh(mesh):
        layer = MoE(made[kind](), gate(), ALL)
        rows = TOKENS.reshape(-1, D)
        expected = on_same(layer.experts, rows)
        experts = [layer.experts[i] for i in range(E)]
        for expert, outputs in zip(experts, expected, strict=True):
            np.testing.assert_allclose(expert(rows), outputs, rtol=1e-4, atol=1e-5)
        again = on_same(MoE(experts, gate(), ALL).experts, rows)
        np.testing.assert_allclose(again, expected, rtol=1e-4, atol=1e-5)
        if kind == "annotated":
            assert experts[3].kernel.get_metadata()["out_sharding"] == (None, "model")
            stacked = layer.experts.stacked.kernel
            assert stacked.get_metadata()["out_sharding"] == (None, None, "model")
        if kind == "base":
            assert experts[3].base.kernel is base.kernel
        np.testing.assert_array_equal(layer.experts[-1](rows), experts[3](rows))
        with pytest.raises(IndexError):
            layer.experts[E]
        nnx.update(experts[3], jax.tree.map(jnp.zeros_like, nnx.state(experts[3])))
        if kind != "base":
            np.testing.assert_array_equal(on_same(layer.experts, rows), expected)


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
        return Block(nnx.Rngs(i), nnx.silu)

    def linear(i: int) -> nnx.Linear:
        return nnx.Linear(D, D, rngs=nnx.Rngs(i))

    modules = [(mlp if i % 2 else linear)(i) for i in range(6)]
    for module in modules:
        module.eval()
    experts = experts_of(modules)
    assert isinstance(experts, MixedExperts) and len(experts.kinds) == 2
    rows = TOKENS.reshape(-1, D)
    expected = np.stack([module(rows) for module in modules])
    np.testing.assert_allclose(on_same(experts, rows), expected, rtol=1e-4, atol=1e-5)
    layer = MoE(experts, gate(6), TokenChoice(k=1, normalize_weights=True))
    outputs, record = nnx.jit(MoE.forward)(layer, TOKENS)
    chosen = np.asarray(record.routing.experts)[0, :, 0]
    kept = np.asarray(record.routing.kept)[0]
    by_hand = expected[chosen, np.arange(B * N)] * kept
    np.testing.assert_allclose(outputs.reshape(-1, D), by_hand, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass
class Power:
    exponent: float
    function: Callable[[jax.Array], jax.Array] = nnx.relu

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.function(x) ** self.exponent


class Plain:
    """Without an equality of its own."""


def reading(value: Any) -> Callable[[jax.Array], jax.Array]:
    return lambda x: x * value


EQUAL: dict[str, Callable[[], Any]] = {
    "function": lambda: nnx.gelu,
    "dataclass": lambda: Power(2.0),
    "list": lambda: [1, {"a": (2.0, None)}],
    "no number": lambda: math.nan,
}


@pytest.mark.parametrize("make", EQUAL.values(), ids=EQUAL)
def test_experts_that_hold_equal_things_are_computed_at_once(make: Callable[[], Any]) -> None:
    assert isinstance(experts_of([Holding(make()) for _ in range(3)]), Copies)


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "captured": (reading(2.0), reading(2.0)),
    "code": (lambda x: x + 1, lambda x: x - 1),
    "text": ("a", "b"),
    "type of a number": (1, True),
    "length": ([1], [1, 1]),
    "keys": ({"a": 1}, {"b": 1}),
    "function": (math.sin, math.cos),
    "partial": (functools.partial(max, 1), functools.partial(max, 2)),
    "method": (Power(2.0).__call__, Power(3.0).__call__),
    "dataclass": (Power(2.0), Power(2.0, nnx.gelu)),
    "object": (Plain(), Plain()),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT)
def test_experts_that_hold_different_things_are_never_computed_at_once(pair: Any) -> None:
    with pytest.warns(UserWarning, match="0 and 1 are both Holding .* but differ in held: 2 kinds"):
        experts = experts_of([Holding(pair[0]), Holding(pair[1]), Holding(pair[0])])
    assert [kind.num_experts for kind in experts.kinds] == [2, 1]
    with pytest.raises(UsageError, match="experts 0 and 1 differ in held, so they cannot be stack"):
        Copies([*map(Holding, pair)])


def test_what_differs_is_named_once() -> None:
    experts = [Block(nnx.Rngs(i), [nnx.gelu, nnx.relu, nnx.silu][i % 3]) for i in range(E)]
    experts[0].eval()
    with pytest.warns(UserWarning, match="experts 0 and 1 are both Block") as caught:
        layer = MoE(experts, gate(), ALL)
    (warning,) = caught
    assert str(warning.message).endswith(
        "differ in activation: 4 kinds are computed one after another"
    )
    rows = TOKENS.reshape(-1, D)
    for expert in experts:
        expert.eval()
    layer.eval()
    expected = np.stack([expert(rows) for expert in experts])
    np.testing.assert_allclose(layer.experts.on_same(rows), expected, rtol=1e-4, atol=1e-5)


def test_a_class_that_is_made_for_each_expert_is_named() -> None:
    def made() -> nnx.Module:
        class Made(Scaled):
            pass

        return Made()

    with pytest.warns(UserWarning, match="0 and 1 are both Made .* differ in their class: 2 kinds"):
        experts_of([made(), made()])


def test_experts_that_are_meant_to_differ_are_not_warned_of() -> None:
    rngs = nnx.Rngs(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for other in (nnx.Linear(D, 2, rngs=rngs), nnx.Linear(D, D, use_bias=False, rngs=rngs)):
            assert isinstance(experts_of([nnx.Linear(D, D, rngs=rngs), other]), MixedExperts)


def test_variables_that_are_tied_in_other_ways_are_not_stacked() -> None:
    def tied(first: int) -> Holding:
        linears = [nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(2)]
        return Holding(nnx.List([*linears, linears[first]]))

    with pytest.warns(UserWarning, match="are both Holding .* but differ in held/2: 2 kinds"):
        experts_of([tied(0), tied(1), tied(0)])


def test_all_shared_experts_are_added_and_padding_stays_zero() -> None:
    layer = MoE([Scaled()] * E, gate(), ALL, shared=StackedMlps(2, D, 5, rngs=nnx.Rngs(0)))
    mask = jnp.broadcast_to(jnp.array([[True], [False]]), (B, N))
    outputs = nnx.jit(lambda layer, x: layer(x, mask=mask))(layer, TOKENS)
    both = np.asarray(on_same(layer.shared, jnp.asarray(TOKENS.reshape(-1, D)))).sum(0)
    expected = (TOKENS.reshape(-1, D) + both).reshape(TOKENS.shape)
    np.testing.assert_allclose(outputs[0], expected[0], rtol=1e-4, atol=1e-5)
    assert (outputs[1] == 0).all()


class Stack(nnx.Module):
    """Two layers, called in a way of its own; their experts are nested lists of modules."""

    def __init__(self, way: str, axes: Any, count: int = 2):
        def make(rngs: nnx.Rngs) -> MoE:
            linear = functools.partial(nnx.Linear, D, rngs=rngs)
            experts = [nnx.Sequential(linear(D), nnx.tanh, linear(D)) for _ in range(E)]
            return MoE(experts, linear(E, use_bias=False), TIGHT)

        self.way, self.axes = way, axes
        if way in ("scan", "vmap"):
            self.layers = nnx.split_rngs(splits=count)(nnx.vmap(make))(nnx.Rngs(0))
        else:
            self.layers = nnx.List([make(nnx.Rngs(i)) for i in range(count)])

    def __call__(self, x: jax.Array) -> jax.Array:
        match self.way:
            case "scan":
                return nnx.scan(
                    lambda x, layer: x + layer(x),
                    in_axes=(nnx.Carry, self.axes),
                    out_axes=nnx.Carry,
                )(x, self.layers)
            case "vmap":
                by_layer = nnx.vmap(lambda layer, x: layer(x), in_axes=(self.axes, None))
                return by_layer(self.layers, x).sum(0)
            case "remat":
                for layer in self.layers:
                    x = x + nnx.remat(lambda layer, x: layer(x))(layer, x)
                return x
        for layer in self.layers:
            x = x + layer(x)
        return x


BY_KIND = nnx.StateAxes({(nnx.Param, nnx.Intermediate): 0, ...: None})


@pytest.mark.parametrize(
    ("way", "axes"),
    [("plain", 0), ("remat", 0), ("scan", 0), ("vmap", 0), ("scan", BY_KIND), ("vmap", BY_KIND)],
)
def test_records_are_reached_under_the_transformations_of_flax(way: str, axes: Any) -> None:
    model = Stack(way, axes)

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


def test_a_soft_router_given_alone_has_groups_of_one_image() -> None:
    slots = nnx.LinearGeneral(D, (E, 2), rngs=nnx.Rngs(0))
    layer = MoE([nnx.Linear(D, 3, rngs=nnx.Rngs(i)) for i in range(E)], slots, Soft())
    outputs, record = nnx.jit(MoE.forward)(layer, TOKENS)
    assert outputs.shape == (B, N, 3) and record.routing.dispatch.shape == (B, N, E, 2)


@pytest.mark.parametrize(
    "router",
    [
        TokenChoice(k=1, noise_std=0.0, normalize_weights=True),
        BiasBalanced(k=1, normalize_weights=True),
    ],
    ids=lambda router: router.kind,
)
def test_the_gate_of_one_expert_per_token_with_weight_1_learns_as_from_its_logarithm(
    router: Router,
) -> None:
    """The gradient of w / stop_gradient(w) is that of log w; the oracle is a formula in float64."""
    router = replace(router, dropless=True)
    experts = [nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(E)]
    layer, target = MoE(experts, gate(), router), np.random.default_rng(1).normal(size=(B * N, D))

    @nnx.jit
    def gradients(layer: MoE) -> Any:
        def loss(layer: MoE) -> tuple[jax.Array, jax.Array]:
            outputs = layer(TOKENS.reshape(1, -1, D))[0]
            return (outputs * target).sum(), outputs

        return nnx.grad(loss, has_aux=True)(layer)

    ours, outputs = gradients(layer)
    x = np.asarray(TOKENS, np.float64).reshape(-1, D)
    logits = x @ np.asarray(gate().kernel[...], np.float64)
    chosen = np.eye(E)[logits.argmax(-1)]
    rows = np.stack([np.asarray(expert(x)) for expert in experts], 1)  # bn e d
    rows = (rows * chosen[..., None]).sum(1)
    np.testing.assert_allclose(outputs, rows, atol=1e-5)
    if isinstance(router, BiasBalanced):
        of_log = chosen / (1 + np.exp(logits))
    else:
        of_log = chosen - np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = x.T @ (of_log * (rows * target).sum(-1, keepdims=True))
    np.testing.assert_allclose(ours["gate"]["kernel"][...], expected, rtol=1e-4, atol=1e-4)


def test_a_config_with_a_gate_without_a_shared_expert_is_refused() -> None:
    with pytest.raises(UsageError, match="shared_gate=True: there is no shared expert"):
        MoEConfig(shared_gate=True)


def test_a_gate_on_the_shared_expert_and_a_routed_scale_equal_a_float64_loop() -> None:
    """Qwen2-MoE's and DeepSeek-V3's, for any modules; each token goes to two of four experts."""
    router = BiasBalanced(k=2, normalize_weights=True)
    router = replace(router, dropless=True)
    experts = [nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(E)]
    shared, own = (nnx.Linear(D, x, rngs=nnx.Rngs(9)) for x in (D, 1))
    layer = MoE(experts, gate(), router, shared=shared, shared_gate=own, routed_scale=2.5)

    def linear(module: nnx.Linear, x: np.ndarray) -> np.ndarray:
        bias = 0.0 if module.bias is None else np.asarray(module.bias[...], np.float64)
        return x @ np.asarray(module.kernel[...], np.float64) + bias

    def sigmoid(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-x))

    outputs = forward(layer, TOKENS)
    for ours, x in zip(outputs.reshape(-1, D), np.float64(TOKENS).reshape(-1, D), strict=True):
        scores = sigmoid(linear(gate(), x))
        chosen = np.argsort(-scores)[:2]
        expected = sigmoid(linear(own, x)) * linear(shared, x)
        for e in chosen:
            expected += 2.5 * scores[e] / scores[chosen].sum() * linear(experts[e], x)
        np.testing.assert_allclose(ours, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(router=TokenChoice(shares=(1.0, 2.0))), "num_experts=4: give one for each expert"),
        (dict(routed_scale=0.0), "routed_scale=0.0: use more than 0"),
        (dict(shared_gate=gate(1)), "shared_gate=Linear: there is no shared expert"),
        (
            dict(exchange=Exchange(buffer_factor=2.0), router=ExpertChoice()),
            "router.kind=expert_choice: no choice of this router may be dropped",
        ),
    ],
)
def test_a_layer_refuses_what_does_not_fit_it(setting: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MoE([nnx.Linear(D, D, rngs=nnx.Rngs(0))] * E, gate(), **setting)


@pytest.mark.parametrize("form", ["mlps", "list"])
def test_forward_mode_is_refused_in_one_line(form: str) -> None:
    """By the tokens, by the gate's parameters, and by the experts'; also of a gradient."""
    config = MoEConfig(num_experts=E)
    layer = MoE.from_config(config, D, 5, N, rngs=nnx.Rngs(0))
    if form == "list":
        layer = MoE([nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(E)], gate())
    graph, state = nnx.split(layer)

    def loss(part: Any, name: str | None = None) -> jax.Array:
        if name is None:
            return nnx.merge(graph, state)(part).sum()
        return nnx.merge(graph, nnx.merge_state(state, nnx.State({name: part})))(TOKENS).sum()

    message = r"no forward-mode derivatives .* use jax.grad, jax.vjp or jax.jacrev"
    for name in (None, "gate", "experts"):
        part = TOKENS if name is None else state[name]
        with pytest.raises(UsageError, match=message):
            jax.jvp(jax.jit(functools.partial(loss, name=name)), (part,), (part,))
    for derivative in (jax.jacfwd, jax.hessian):
        with pytest.raises(UsageError, match=message):
            jax.jit(derivative(loss))(TOKENS)


@pytest.mark.slow
def test_reverse_over_reverse_is_the_hessian_and_is_vectorized() -> None:
    """Of the loss by a few numbers; the oracle is central differences of the gradient."""
    experts = [nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(E)]
    layer = MoE(experts, gate(), ALL)

    def loss(x: jax.Array) -> jax.Array:
        return (layer(TOKENS.at[0, 0, :3].add(x)) ** 2).sum()

    gradient = jax.jit(jax.grad(loss))
    ours = jax.jit(jax.jacrev(jax.grad(loss)))(jnp.zeros(3))
    steps = 1e-2 * np.eye(3, dtype=np.float32)
    expected = np.stack([(gradient(x) - gradient(-x)) / 2e-2 for x in steps])
    np.testing.assert_allclose(ours, expected, rtol=1e-2, atol=1e-2)


def test_a_list_of_modules_computes_in_float64_for_such_tokens() -> None:
    """Outputs and gradients of each expert; the oracle is a loop for the same decisions."""
    with jax.enable_x64(True):
        experts = [nnx.Linear(D, 3, param_dtype=float, rngs=nnx.Rngs(i)) for i in range(E)]
        own = nnx.Linear(D, E, use_bias=False, param_dtype=float, rngs=nnx.Rngs(9))
        layer = MoE(experts, own, TIGHT)
        x, target = np.float64(TOKENS).reshape(-1, D), np.random.default_rng(1).normal(size=3)

        @nnx.jit
        def run(layer: MoE) -> Any:
            def loss(layer: MoE) -> Any:
                outputs, record = layer.forward(TOKENS.astype(float))
                return (outputs * target).sum(), (outputs, record.routing)

            return nnx.grad(loss, has_aux=True)(layer)

        gradients, (outputs, routing) = jax.tree.map(np.asarray, run(layer))
    chosen, weights = routing.experts[0, :, 0], routing.weights[0]
    kernels = [np.float64(expert.kernel.get_value()) for expert in experts]
    assert weights.dtype == outputs.dtype == np.float64 and 0 < (weights > 0).mean() < 1
    rows = [x[i] @ kernels[e] for i, e in enumerate(chosen)]
    np.testing.assert_allclose(outputs.reshape(-1, 3), weights * np.stack(rows), atol=1e-12)
    for e in range(E):
        expected = (x * weights * (chosen == e)[:, None]).sum(0)[:, None] * target
        kernel = gradients["experts"]["stacked"]["kernel"].get_value()[e]
        np.testing.assert_allclose(kernel, expected, atol=1e-12)
