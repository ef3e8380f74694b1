"""Properties of every registered router, over several shapes, seeds and implementations.

The numbers refer to the list in CONTRIBUTING.md. Every registered router is tested with its default
settings. ``EXEMPT`` is a table of properties and routers: it has the reason of each pair that is
not tested. Compiling takes nearly all of the time, so every property runs a router's programs of a
few shapes (``program``) with other tokens, and none has a program of its own.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.oracles import experts_of, moe_by_einsum, moe_by_loop, one_hot_dispatch
from tests.random_models import outputs
from tests.routers import ROUTERS, grouped
from vmoe.axes import Record, Routing
from vmoe.config import (
    BiasBalanced,
    ByTask,
    ExpertChoice,
    ExpertRace,
    MlpExpert,
    MoEConfig,
    Router,
    Sinkhorn,
    TokenChoice,
    replace,
)
from vmoe.config.experts import Implementation
from vmoe.nn.mlp import Mlp
from vmoe.nn.moe import MoE
from vmoe.routing.priority import Priority

WIDTH, MLP_DIM = 6, 10
Shape = tuple[int, int, int, float | None, int]
"""b n e, the capacity factor, None for a dropless layer, and the images per group."""
TIGHT: Shape = (4, 9, 4, 0.4, 1)
UNEVEN: Shape = (3, 5, 3, 0.8, 2)  # two groups of two, the last image is padding
ROOMY: Shape = (2, 17, 8, 8.0, 2)  # capacity for every token
SHAPES = {"4x9_e4_tight": TIGHT, "3x5_e3": UNEVEN, "2x17_e8_roomy": ROOMY}
IMPLEMENTATIONS = get_args(Implementation)
LONG = pytest.mark.slow

KINDS: dict[str, Router] = {config().kind: config() for config in ROUTERS} | {"by_task": ByTask()}
ROUTER_CONFIGS: dict[str, Router] = {
    **KINDS,
    # settings that take another code path
    **{f"{priority}_first": TokenChoice(priority=priority) for priority in get_args(Priority)[1:]},
    "k1": TokenChoice(k=1, priority="largest_gate"),
    "k3_normalized": TokenChoice(k=3, normalize_weights=True),
    "next_expert": TokenChoice(overflow="next_expert", priority="largest_gate"),
    "race_softmax": ExpertRace(scores="softmax"),
    "choice_by_threshold": ExpertChoice(threshold_rate=0.1),
    "sinkhorn_k1": Sinkhorn(k=1),
    "bias_softmax": BiasBalanced(k=1, scores="softmax", priority="largest_gate"),
}
"""Every registered router with its defaults, and further settings."""

BY_INDEX = "its priority depends on the index of a token in the group"
BY_POSITION = "a token's position in the image determines its experts"
NO_DROPS = "no choice is ever dropped"
ORDERED = dict.fromkeys(
    (
        *("token_choice", "random_first", "k3_normalized", "switch", "gshard", "bias_balanced"),
        *("sinkhorn", "sinkhorn_k1", "transport", "relu", "top_p", "by_task"),
    ),
    BY_INDEX,
)
FIXED = dict.fromkeys(("random", "hash"), BY_POSITION)
NEVER_DROP = dict.fromkeys(
    ("expert_choice", "choice_by_threshold", "soft", "transport_expert_choice"), NO_DROPS
)
PLANNED = dict.fromkeys(
    ("transport", "transport_expert_choice"), "its plan balances the tokens of a group"
)
FIRST = dict.fromkeys(
    (*(f"{priority}_first" for priority in get_args(Priority)[1:]), "k1"),
    "it changes only which choices are kept, which the einsums take from the record",
)
AS_TOKEN_CHOICE = "its routing is index arrays of the same form as token choice's"
EXEMPT: dict[str, dict[str, str]] = {
    "one expert is the dense MLP": {
        "soft": "its slots are mixtures of tokens",
        "gshard": "it needs two experts",
        "relu": "the weight is a logit, which is not 1",
        **dict.fromkeys(
            ("bias_balanced", "expert_race", "sinkhorn", "sinkhorn_k1"),
            "the weight is a sigmoid, which is not 1",
        ),
    },
    "slots are used once": {"soft": "every slot is a mixture of all tokens"},
    "priority by gates": ORDERED
    | FIXED
    | NEVER_DROP
    | dict.fromkeys(("expert_race", "race_softmax"), "experts take their best winners"),
    "permutations": ORDERED | FIXED,
    "einsums in float64": dict.fromkeys(
        ROUTER_CONFIGS.keys() - KINDS.keys(), "its gradients are compared in float64"
    ),
    "float64": FIRST,
    "padding inside a group": {"soft": "its groups are single images"},
    "capacity for every token": {"soft": "its slots mix any number of tokens"} | PLANNED,
    "dropless": NEVER_DROP | PLANNED,
    "sorted rows": {"soft": "every slot is filled, so that only batched is allowed"}
    | dict.fromkeys(
        (
            *("switch", "gshard", "bias_balanced", "random", "hash", "sinkhorn", "transport"),
            *("relu", "top_p", "by_task"),
        ),
        AS_TOKEN_CHOICE,
    )
    | {"transport_expert_choice": "its routing is of the same form as expert choice's"},
}
"""Property -> router config -> the reason why the property does not apply to it."""

TESTED = {"sorted rows"}  # the properties that have a test


def routers(name: str, *, each_implementation: bool = False) -> pytest.MarkDecorator:
    """Parametrizes the test of a property with every router that is not exempt from it.

    An implementation gets only the slots and weights of the choices. So every implementation is
    tested with one config of each form of routing, and the other settings with one implementation.
    By default every router runs with one implementation, every implementation with one router, and
    further settings in the test of the outputs.
    """
    TESTED.add(name)
    configs = {r: c for r, c in ROUTER_CONFIGS.items() if r not in EXEMPT.get(name, {})}
    if not each_implementation:
        return pytest.mark.parametrize("router", configs.values(), ids=configs.keys())
    default = {"float64 loop": ROUTER_CONFIGS, "float64": ("soft", "random")}.get(name, KINDS)
    cases = {
        f"{router}-{implementation}": pytest.param(config, implementation, marks=marks)
        for router, config in configs.items()
        for i, implementation in enumerate(_implementations(name, router))
        for marks in [() if router == "token_choice" or (router in default and not i) else LONG]
    }
    return pytest.mark.parametrize(("router", "implementation"), cases.values(), ids=cases.keys())


def scores_of(router: Router) -> Callable[[jax.Array], jax.Array]:
    """The function from the logits of a token to its combine weights, before normalization."""
    if router.kind == "relu":
        return jax.nn.relu
    sigmoid = getattr(router, "scores", None) == "sigmoid" or (
        isinstance(router, Sinkhorn) and router.k == 1
    )
    return jax.nn.sigmoid if sigmoid else jax.nn.softmax


def _implementations(name: str, router: str) -> tuple[str, ...]:
    """The implementations that a router of ``ROUTER_CONFIGS`` is tested with for a property."""
    if router in EXEMPT["sorted rows"] or router not in KINDS:
        return ("auto",)
    if name == "einsums in float64" and router != "token_choice":
        return IMPLEMENTATIONS[:1]  # the gradients of each are compared in float64
    return IMPLEMENTATIONS


shape = pytest.mark.parametrize(
    "shape",
    [TIGHT, *(pytest.param(shape, marks=LONG) for shape in SHAPES.values() if shape != TIGHT)],
    ids=SHAPES.keys(),
)


def test_every_router_and_every_property_with_an_exemption_is_tested() -> None:
    assert {type(config) for config in ROUTER_CONFIGS.values()} == {*ROUTERS, ByTask}
    assert EXEMPT.keys() <= TESTED
    for reasons in EXEMPT.values():
        assert reasons.keys() <= ROUTER_CONFIGS.keys() and all(reasons.values())


@functools.cache
def layer(router: Router, shape: Shape, seed: int = 0, implementation: str = "auto") -> MoE:
    """An MoE layer whose experts differ, with random state."""
    _, n, e, factor, images_per_group = shape
    own = dict(dropless=factor is None, capacity_multiple=1)
    own |= {} if factor is None else dict(capacity_factor=factor)
    config = MoEConfig(
        num_experts=e,
        router=grouped(
            replace(router, **{name: x for name, x in own.items() if router.has(name)}),
            images_per_group,
        ),
        experts=MlpExpert(implementation=implementation, shared_init=False),
    )
    moe = MoE.from_config(config, WIDTH, MLP_DIM, n, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    for variable in (moe.state or {}).values():
        noise = rng.normal(size=variable.shape) / 10
        variable[...] = variable[...] + jnp.asarray(noise, jnp.float32)
    return moe


def images(shape: Shape, seed: int = 0) -> np.ndarray:
    b, n, *_ = shape
    return np.random.default_rng(seed).normal(size=(b, n, WIDTH)).astype(np.float32)


def per_token(moe: MoE, tokens: jax.Array) -> dict[str, jax.Array] | None:
    """What the router reads: a task, which follows from the values of a token, so stays with it."""
    tasks = (jnp.abs(tokens[..., 0]) * 100).astype(jnp.int32) % moe.experts.num_experts
    return {"task": tasks} if moe.router.takes else None


@functools.partial(jax.jit, static_argnums=0)
def program(
    graph: nnx.GraphDef, state: nnx.State, tokens: jax.Array, mask: jax.Array
) -> tuple[jax.Array, Record]:
    """The outputs and the record of a layer; one program for each layer and shape of tokens."""
    moe = nnx.merge(graph, state)
    return moe.forward(tokens, mask=mask, per_token=per_token(moe, tokens))


def run(moe: MoE, tokens: np.ndarray, valid: np.ndarray | None = None) -> tuple[np.ndarray, Record]:
    valid = np.ones(len(tokens), bool) if valid is None else valid
    mask = np.broadcast_to(valid[:, None], tokens.shape[:2])
    out, record = program(*nnx.split(moe), tokens, mask)
    return np.asarray(out), record


def assert_equal_to_rounding(ours: np.ndarray, expected: np.ndarray) -> None:
    """On some processors the rounding of a row depends on its position in the matrix product."""
    np.testing.assert_allclose(ours, expected, rtol=1e-6, atol=1e-6)


def groups_of(moe: MoE, tokens: np.ndarray) -> np.ndarray:
    """The tokens of each group; zeros are padding."""
    size = moe.router.images_per_group
    full = np.concatenate([tokens, np.zeros_like(tokens[: -len(tokens) % size])])
    return full.reshape(-1, size * tokens.shape[1], WIDTH)


@routers("one expert is the dense MLP", each_implementation=True)
def test_1_one_expert_with_capacity_for_every_token_is_the_dense_mlp(
    router: Router, implementation: str
) -> None:
    if router.k > 1:
        router = dataclasses.replace(router, **{"k" if router.has("k") else "target_k": 1})
    shape = (2, 5, 1, 4.0, 2)
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    dense = Mlp(WIDTH, MLP_DIM, dtype=jnp.float32, rngs=nnx.Rngs(0))
    for ours, theirs in ((dense.up, moe.experts.up), (dense.down, moe.experts.down)):
        ours.kernel[...], ours.bias[...] = theirs.kernel[0], theirs.bias[0]
    np.testing.assert_allclose(run(moe, tokens)[0], outputs(dense, tokens), atol=1e-6)


@routers("float64 loop", each_implementation=True)
@shape
def test_2_the_output_equals_a_float64_loop(
    router: Router, implementation: str, shape: Shape
) -> None:
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    out, record = run(moe, tokens)
    expected = moe_by_loop(moe, groups_of(moe, tokens), record).reshape(-1, *tokens.shape[1:])
    np.testing.assert_allclose(out, expected[: len(tokens)], atol=2e-6)


@routers("slots are used once")
@shape
def test_3_a_slot_has_one_token_and_a_token_is_sent_to_an_expert_once(
    router: Router, shape: Shape
) -> None:
    for seed in range(2):
        _, record = run(layer(router, shape, seed), images(shape, seed))
        routing: Routing = record.routing
        sent = one_hot_dispatch(routing)
        assert sent.sum(axis=1).max() <= 1, "a slot holds two tokens"
        assert sent.sum(axis=3).max() <= 1, "a token was sent to an expert twice"
        k = routing.slots.shape[-1]  # e if a token may have any number of experts
        assert sent.sum(axis=(2, 3)).max() <= k
        # ``choices`` agrees with ``slots``
        g, s = routing.slots.shape[:2]
        tokens = np.where(sent.any(axis=1), sent.argmax(axis=1), s)
        np.testing.assert_array_equal(routing.tokens, tokens)
        np.testing.assert_array_equal(routing.kept.sum(), sent.sum())
        assert np.all(np.asarray(routing.weights)[~np.asarray(routing.kept)] == 0)


@routers("priority by gates")
@shape
def test_4_no_dropped_choice_scores_above_a_kept_one(router: Router, shape: Shape) -> None:
    for seed in range(2):
        _, record = run(layer(router, shape, seed), images(shape, seed))
        valid, experts, every_kept = map(
            np.asarray, (record.valid, record.routing.experts, record.routing.kept)
        )
        chosen = np.minimum(experts, shape[2] - 1)
        gates = np.take_along_axis(np.asarray(record.gates), chosen, axis=-1)
        summed = {"largest_gate": 1, "sum_of_gates": router.k}[router.priority]
        score = gates[..., :summed].sum(-1)
        for g, e, rank in np.ndindex(len(gates), shape[2], router.k):
            here, kept = (experts[g, :, rank] == e) & valid[g], every_kept[g, :, rank]
            if (here & kept).any() and (here & ~kept).any():
                assert score[g][here & kept].min() >= score[g][here & ~kept].max()


@routers("permutations")
@shape
def test_5_permuting_a_group_permutes_its_output(router: Router, shape: Shape) -> None:
    for seed in range(2):
        moe, tokens = layer(router, shape, seed), images(shape, seed)
        full = len(tokens) // moe.router.images_per_group * moe.router.images_per_group
        groups = groups_of(moe, tokens[:full])
        shuffled = np.random.default_rng(0).permutation(groups.shape[1])
        other = tokens.copy()
        other[:full] = groups[:, shuffled].reshape(-1, *tokens.shape[1:])
        one, two = (groups_of(moe, run(moe, x)[0][:full]) for x in (tokens, other))
        np.testing.assert_allclose(two, one[:, shuffled], atol=1e-6)


@routers("einsums in float64", each_implementation=True)
def test_6_output_and_gradients_equal_einsums_in_float64(
    router: Router, implementation: str
) -> None:
    assert_equal_to_einsums(layer(router, TIGHT, implementation=implementation), atol=2e-5)


@routers("float64", each_implementation=True)
def test_6_so_they_do_in_a_layer_that_computes_in_float64(
    router: Router, implementation: str
) -> None:
    """With a key, for the draws; noise and jitter, which einsums do not have, are off.

    So are GShard's draws, by which a token may have one expert of two.
    """
    fields = {field.name for field in dataclasses.fields(router)}
    router = replace(router, **dict.fromkeys(fields & {"noise_std", "jitter"}, 0.0))
    moe = layer(router, TIGHT, implementation=implementation)
    key = None if router.kind == "gshard" else jax.random.key(0)
    assert_equal_to_einsums(moe, jnp.float64, key, atol=1e-12)


def assert_equal_to_einsums(
    moe: MoE, dtype: Any = jnp.float32, key: jax.Array | None = None, *, atol: float
) -> None:
    """The sum of the outputs with random weights, and its gradients, for the same decisions."""
    tokens, router = images(TIGHT), moe.router
    target = np.random.default_rng(5).normal(size=tokens.shape).astype(np.float32)
    graph, state = nnx.split(moe)

    def loss(params: dict, tokens: jax.Array) -> tuple[jax.Array, Record]:
        moe = nnx.merge(graph, params)
        out, record = moe.forward(tokens, key=key, per_token=per_token(moe, tokens))
        return (out * target).sum(), record

    scores = scores_of(router)
    inputs = nnx.to_pure_dict(state), tokens
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
    with jax.enable_x64(dtype == jnp.float64):
        gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        (value, record), gradients = gradient(*(exact if dtype == jnp.float64 else inputs))
    assert {x.dtype for x in jax.tree.leaves((value, gradients))} == {jnp.dtype(dtype)}
    used = record._replace(logits=None, losses=None, sums=None, aux_loss=None, valid=None)
    with jax.enable_x64(True):
        expected = _einsum_gradient(scores, router.normalized, *exact, np.float64(target), used)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, atol=atol, rtol=atol),
        (value, gradients),
        expected,
    )


@pytest.mark.long_after(1)
@pytest.mark.parametrize(
    "name", dict.fromkeys(("random_first", "switch", "gshard", "random", *KINDS))
)
def test_6_a_float32_layer_computes_the_same_in_training_if_float64_is_enabled(
    name: str,
) -> None:
    """Most kinds of draws and noise are in the first four."""
    router = ROUTER_CONFIGS[name]
    tokens, key = images(TIGHT), jax.random.key(0)
    graph, state = nnx.split(layer(router, TIGHT))

    def forward(state: nnx.State, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        moe = nnx.merge(graph, state)
        out, record = moe.forward(tokens, key=key, per_token=per_token(moe, tokens))
        return out, record.aux_loss

    expected = jax.jit(forward)(state, tokens)
    with jax.enable_x64(True):
        ours = jax.jit(forward)(state, tokens)
    assert [x.dtype for x in ours] == [jnp.float32] * 2
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), ours, expected)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _einsum_gradient(
    scores: Callable[[jax.Array], jax.Array],
    normalize: bool,
    params: dict,
    tokens: jax.Array,
    target: jax.Array,
    record: Record,
) -> tuple[jax.Array, tuple[dict, jax.Array]]:
    def loss(params: dict, tokens: jax.Array) -> jax.Array:
        out = moe_by_einsum(params, tokens, record, scores=scores, normalize=normalize)
        return (out * target).sum()

    return jax.value_and_grad(loss, argnums=(0, 1))(params, tokens)


def assert_independent_of_the_batch(moe: MoE, tokens: np.ndarray) -> np.ndarray:
    """An image has the same output in another order, and without the others; returns it."""
    out, _ = run(moe, tokens)
    assert_equal_to_rounding(run(moe, tokens[::-1])[0][::-1], out)
    alone = np.concatenate([tokens[:1], 9 * tokens[1:]])  # the others are padding
    first = np.arange(len(tokens)) == 0
    np.testing.assert_allclose(run(moe, alone, first)[0][:1], out[:1], atol=1e-5)
    return out


@routers("single images", each_implementation=True)
def test_7_an_image_alone_in_its_group_does_not_depend_on_its_batch(
    router: Router, implementation: str
) -> None:
    moe = layer(router, TIGHT, implementation=implementation)
    assert_independent_of_the_batch(moe, images(TIGHT))


@routers("capacity for every token")
def test_7_with_capacity_for_every_token_an_image_does_not_depend_on_its_batch(
    router: Router,
) -> None:
    assert_independent_of_the_batch(layer(router, ROOMY), images(ROOMY))


@pytest.mark.parametrize("shape", [TIGHT, (4, 9, 4, None, 2)])
def test_7_an_image_does_not_depend_on_the_size_of_its_batch(shape: Shape) -> None:
    moe, tokens = layer(TokenChoice(), shape), images(shape)
    np.testing.assert_allclose(run(moe, tokens[:1])[0], run(moe, tokens)[0][:1], atol=1e-5)


@routers("padding", each_implementation=True)
def test_8_padding_changes_nothing(router: Router, implementation: str) -> None:
    """Padding with large values, in groups of its own."""
    moe, tokens = layer(router, TIGHT, implementation=implementation), images(TIGHT)[:2]
    out, record = run(moe, np.concatenate([tokens, tokens]))
    padded, padded_record = run(moe, np.concatenate([tokens, 9 * tokens]), np.arange(4) < 2)
    np.testing.assert_allclose(padded[:2], out[:2], atol=1e-6)
    assert float(padded_record.aux_loss) == pytest.approx(float(record.aux_loss), rel=1e-6)


@routers("padding inside a group", each_implementation=True)
def test_8_padding_inside_a_group_never_takes_a_slot(router: Router, implementation: str) -> None:
    moe, tokens = layer(router, UNEVEN, implementation=implementation), images(UNEVEN)
    out, record = run(moe, tokens)
    assert record.valid.shape == (2, 10) and int(record.valid.sum()) == 15
    padding = ~np.asarray(record.valid)
    assert not np.asarray(record.routing.kept)[padding].any()
    assert not np.asarray(record.routing.dropped)[padding].any()
    # so the other image of the group has all of its slots
    with_padding = np.stack([tokens[2], 9 * tokens[2], tokens[2]])
    with_padding, record = run(moe, with_padding, np.array([True, False, True]))
    assert not np.asarray(record.routing.kept)[~np.asarray(record.valid)].any()
    np.testing.assert_allclose(with_padding[[0, 2]], out[[2, 2]], atol=1e-6)


@routers("dropless", each_implementation=True)
def test_a_dropless_layer_drops_nothing_and_an_image_does_not_depend_on_its_batch(
    router: Router, implementation: str
) -> None:
    shape = (4, 9, 5, None, 2)
    moe, tokens = layer(router, shape, implementation=implementation), images(shape)
    tokens = tokens + 3.0  # so that most tokens prefer the same experts
    out, record = run(moe, tokens)
    assert not np.asarray(record.routing.dropped).any()
    expected = moe_by_loop(moe, groups_of(moe, tokens), record).reshape(tokens.shape)
    np.testing.assert_allclose(out, expected, atol=2e-5)
    assert_independent_of_the_batch(moe, tokens)


def test_the_experts_of_the_layer_equal_those_of_the_oracle() -> None:
    moe = layer(ROUTER_CONFIGS["k1"], UNEVEN)
    rows = np.random.default_rng(0).normal(size=(1, 3, 2, WIDTH)).astype(np.float32)
    out, expert = np.asarray(moe.experts(jnp.asarray(rows))), experts_of(moe)
    for e, c in np.ndindex(3, 2):
        np.testing.assert_allclose(out[0, e, c], expert(e, rows[0, e, c]), atol=1e-6)
