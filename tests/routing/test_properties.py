"""What holds for every router, shape and seed that it applies to.

The numbers are those of the list of properties in CONTRIBUTING.md.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.oracles import expert, moe_by_einsum, moe_by_loop, one_hot_dispatch
from vmoe.axes import Record, Routing
from vmoe.config import ExpertChoice, MoEConfig, Router, Soft, TokenChoice
from vmoe.nn.mlp import Mlp
from vmoe.nn.moe import MoE
from vmoe.routing import ROUTERS

WIDTH, HIDDEN = 6, 10
PRIORITIES = ("order", "largest_gate", "sum_of_gates", "random")
CHOOSING: dict[str, Router] = {
    **{f"k2_{priority}": TokenChoice(k=2, priority=priority) for priority in PRIORITIES},
    "k1": TokenChoice(k=1, priority="largest_gate"),
    "k3_normalized": TokenChoice(k=3, normalize_weights=True),
    "expert_choice": ExpertChoice(),
}
ALL: dict[str, Router] = CHOOSING | {"soft": Soft()}
SHAPES = {"4x9_e4_tight": (4, 9, 4, 0.4), "3x5_e3": (3, 5, 3, 1.0), "2x17_e8": (2, 17, 8, 1.05)}

IMPLEMENTATIONS = ("batched", "blocked", "ragged")
COMPUTED = {
    f"{name}-{implementation}": (router, implementation)
    for name, router in ALL.items()
    for implementation in IMPLEMENTATIONS
    if implementation == "batched" or not isinstance(router, Soft)
}

computed = pytest.mark.parametrize(
    ("router", "implementation"), COMPUTED.values(), ids=COMPUTED.keys()
)
choosing = pytest.mark.parametrize("router", CHOOSING.values(), ids=CHOOSING.keys())
shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
seed = pytest.mark.parametrize("seed", range(2))


def test_every_router_stands_under_these_properties() -> None:
    assert {type(config) for config in ALL.values()} == set(ROUTERS)


@functools.cache
def layer(
    router: Router,
    shape: tuple,
    seed: int = 0,
    images_per_group: int = 2,
    implementation: str = "auto",
) -> MoE:
    """A sparse layer with routers and experts that all differ; a factor of None is no capacity."""
    _, n, e, factor = shape
    config = MoEConfig(
        implementation=implementation,
        dropless=factor is None,
        num_experts=e,
        router=router,
        capacity_factor=factor or 1.0,
        capacity_multiple=1,
        images_per_group=1 if isinstance(router, Soft) else images_per_group,
        shared_init=False,
    )
    return MoE(WIDTH, HIDDEN, n, config, rngs=nnx.Rngs(seed))


def images(shape: tuple, seed: int = 0) -> jax.Array:
    b, n, _, _ = shape
    return jax.random.normal(jax.random.key(seed + 100), (b, n, WIDTH))


@functools.partial(jax.jit, static_argnums=0)
def _run(graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, valid: jax.Array):
    return nnx.merge(graph, state)(tokens, valid)


def run(moe: MoE, tokens: jax.Array, valid: jax.Array | None = None) -> tuple[jax.Array, Record]:
    valid = jnp.ones(len(tokens), bool) if valid is None else valid
    return _run(*nnx.split(moe), tokens, valid)


def groups_of(moe: MoE, tokens: jax.Array) -> np.ndarray:
    return np.asarray(tokens).reshape(-1, moe.config.images_per_group * tokens.shape[1], WIDTH)


@choosing
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_1_one_expert_with_room_for_all_is_the_dense_mlp(
    router: Router, implementation: str
) -> None:
    if isinstance(router, TokenChoice):
        router = dataclasses.replace(router, k=1)
    shape = (2, 5, 1, 4.0)
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    dense = Mlp(WIDTH, HIDDEN, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for ours, theirs in ((dense.up, moe.experts.up), (dense.down, moe.experts.down)):
        ours.kernel[...], ours.bias[...] = theirs.kernel[0], theirs.bias[0]
    np.testing.assert_allclose(run(moe, tokens)[0], dense(tokens), atol=1e-6)


@computed
@shape
def test_2_the_result_is_that_of_a_float64_loop(
    router: Router, implementation: str, shape: tuple
) -> None:
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    if shape[0] % moe.config.images_per_group:
        tokens = tokens[:2]
    out, record = run(moe, tokens)
    expected = moe_by_loop(moe, groups_of(moe, tokens), record).reshape(tokens.shape)
    np.testing.assert_allclose(out, expected, atol=2e-6)


@choosing
@shape
@seed
def test_3_slots_tokens_and_choices_are_used_once(router: Router, shape: tuple, seed: int) -> None:
    _, record = run(layer(router, shape, seed), images(shape, seed))
    routing: Routing = record.routing
    sent = one_hot_dispatch(routing)
    assert sent.sum(axis=1).max() <= 1, "a slot holds two tokens"
    assert sent.sum(axis=3).max() <= 1, "a token was sent to an expert twice"
    k = router.k if isinstance(router, TokenChoice) else shape[2]
    assert sent.sum(axis=(2, 3)).max() <= k
    # choices says the same as slots
    g, s = routing.slots.shape[:2]
    tokens = np.where(sent.any(axis=1), sent.argmax(axis=1), s)
    np.testing.assert_array_equal(routing.tokens, tokens)
    np.testing.assert_array_equal(routing.kept.sum(), sent.sum())
    assert np.all(np.asarray(routing.weights)[~np.asarray(routing.kept)] == 0)


@pytest.mark.parametrize("priority", ["largest_gate", "sum_of_gates"])
@shape
@seed
def test_4_no_dropped_choice_scores_above_a_kept_one(
    priority: str, shape: tuple, seed: int
) -> None:
    moe = layer(TokenChoice(priority=priority), shape, seed)
    _, record = run(moe, images(shape, seed))
    routing, gates = record.routing, np.sort(np.asarray(record.gates), axis=-1)[..., ::-1]
    score = gates[..., 0] if priority == "largest_gate" else gates[..., :2].sum(-1)
    for g, e, rank in np.ndindex(len(gates), shape[2], 2):
        here = (np.asarray(routing.experts[g, :, rank]) == e) & np.asarray(record.valid[g])
        kept = np.asarray(routing.kept[g, :, rank])
        if (here & kept).any() and (here & ~kept).any():
            assert score[g][here & kept].min() >= score[g][here & ~kept].max()


ORDERLESS = {
    name: ALL[name]
    for name in ("k2_largest_gate", "k2_sum_of_gates", "k1", "expert_choice", "soft")
}


@pytest.mark.parametrize("router", ORDERLESS.values(), ids=ORDERLESS.keys())
@shape
@seed
def test_5_permuting_a_group_permutes_its_output(router: Router, shape: tuple, seed: int) -> None:
    moe = layer(router, shape, seed, images_per_group=1)
    tokens = images(shape, seed)
    shuffled = np.random.default_rng(0).permutation(tokens.shape[1])
    expected = run(moe, tokens)[0][:, shuffled]
    np.testing.assert_allclose(run(moe, tokens[:, shuffled])[0], expected, atol=1e-6)


@computed
@pytest.mark.parametrize("shape", [SHAPES["4x9_e4_tight"], SHAPES["2x17_e8"]])
def test_6_output_and_gradients_are_those_of_einsums_in_float64(
    router: Router, implementation: str, shape: tuple
) -> None:
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    _, record = run(moe, tokens)
    graph, state = nnx.split(moe)
    params = nnx.to_pure_dict(state)
    target = jax.random.normal(jax.random.key(5), tokens.shape)

    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        out, _ = nnx.merge(graph, params)(tokens, jnp.ones(len(tokens), bool))
        return (out * target).sum()

    def loss64(params: dict, tokens: jax.Array) -> jax.Array:
        return (moe_by_einsum(moe, params, tokens, record) * target).sum()

    found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, tokens)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), (params, tokens))
        expected = jax.jit(jax.value_and_grad(loss64, argnums=(0, 1)))(*exact)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), found, expected)


@computed
def test_7_alone_in_its_group_an_image_does_not_depend_on_its_batch(
    router: Router, implementation: str
) -> None:
    shape = SHAPES["4x9_e4_tight"]
    moe = layer(router, shape, images_per_group=1, implementation=implementation)
    tokens = images(shape)
    out, _ = run(moe, tokens)
    np.testing.assert_array_equal(run(moe, tokens[::-1])[0][::-1], out)
    np.testing.assert_allclose(run(moe, tokens[:1])[0], out[:1], atol=1e-5)


@pytest.mark.parametrize("priority", PRIORITIES)
def test_7_with_room_for_all_an_image_does_not_depend_on_its_batch(priority: str) -> None:
    router = TokenChoice(priority=priority)
    shape = (4, 9, 4, 4.0)
    moe, tokens = layer(router, shape), images(shape)
    out, _ = run(moe, tokens)
    np.testing.assert_array_equal(run(moe, tokens[::-1])[0][::-1], out)
    np.testing.assert_allclose(run(moe, tokens[:1])[0], out[:1], atol=1e-5)


@computed
@pytest.mark.parametrize("shape", [SHAPES["4x9_e4_tight"], SHAPES["2x17_e8"]])
def test_8_padding_changes_nothing(router: Router, implementation: str, shape: tuple) -> None:
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    out, record = run(moe, tokens)
    fuller = jnp.concatenate([tokens, 9 * tokens])  # large values, in groups of their own
    valid = jnp.arange(len(fuller)) < len(tokens)
    padded, padded_record = run(moe, fuller, valid)
    np.testing.assert_allclose(padded[: len(tokens)], out, atol=1e-6)
    assert float(padded_record.aux_loss) == pytest.approx(float(record.aux_loss), rel=1e-6)


@choosing
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_8_padding_inside_a_group_never_takes_a_slot(router: Router, implementation: str) -> None:
    shape = (3, 5, 3, 1.0)  # two groups of two, the last image is padding
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    out, record = run(moe, tokens)
    assert record.valid.shape == (2, 10) and int(record.valid.sum()) == 15
    assert not np.asarray(record.routing.kept)[~np.asarray(record.valid)].any()
    assert not np.asarray(record.routing.dropped)[~np.asarray(record.valid)].any()
    # ... so the image beside it has the slots of the group for itself
    given = jnp.concatenate([tokens[2:], 9 * tokens[2:]])
    alone, _ = run(moe, given, jnp.array([True, False]))
    np.testing.assert_allclose(out[2], alone[0], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("router", [TokenChoice(), TokenChoice(k=3, normalize_weights=True)])
def test_without_capacity_nothing_is_dropped_and_an_image_does_not_depend_on_its_batch(
    router: Router, implementation: str
) -> None:
    shape = (4, 9, 5, None)
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    tokens = tokens + 3.0  # so that most tokens prefer the same experts
    out, record = run(moe, tokens)
    assert not np.asarray(record.routing.dropped).any()
    expected = moe_by_loop(moe, groups_of(moe, tokens), record).reshape(tokens.shape)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    np.testing.assert_array_equal(run(moe, tokens[::-1])[0][::-1], out)
    np.testing.assert_allclose(run(moe, tokens[:1])[0], out[:1], atol=1e-5)


def test_an_expert_is_the_same_function_in_the_layer_and_in_the_oracle() -> None:
    moe = layer(CHOOSING["k1"], SHAPES["3x5_e3"])
    rows = np.random.default_rng(0).normal(size=(1, 3, 2, WIDTH)).astype(np.float32)
    out = moe.experts(jnp.asarray(rows))
    for e, c in np.ndindex(3, 2):
        np.testing.assert_allclose(out[0, e, c], expert(moe, e, rows[0, e, c]), atol=1e-6)
