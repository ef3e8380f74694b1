"""Experts of an MoE layer of every kind; the oracle is a loop over groups and experts in float64.

The loop takes the layer's decisions, which tests/routing compares with oracles of their own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import expit, softmax

from tests.oracles import gelu
from vmoe import models
from vmoe.axes import Decision, Record, Routing
from vmoe.config import (
    AttentionExpert,
    CnnExpert,
    ConstantExpert,
    Exchange,
    ExpertChoice,
    ExpertList,
    GatedMlpExpert,
    IdentityExpert,
    MlpExpert,
    MoEConfig,
    Soft,
    TokenChoice,
    ViTConfig,
    ZeroExpert,
    replace,
)
from vmoe.config.experts import Expert
from vmoe.errors import UsageError
from vmoe.nn.experts import Copies, MixedExperts, Slots, StackedMlps, experts_of
from vmoe.nn.moe import MoE
from vmoe.nn.vit import ViT

B, N, D, E = 5, 5, 8, 4  # images, of a class token and 2 x 2 patches; width; experts
RNG = np.random.default_rng(0)
TOKENS = jnp.float32(RNG.normal(size=(B, N, D)))
MASK = jnp.arange(B)[:, None] < jnp.full(N, B - 1)  # the last image only pads the batch
SMALL = MoEConfig(
    num_experts=E,
    router=TokenChoice(
        k=2, noise_std=0.0, capacity_factor=0.8, capacity_multiple=1, images_per_group=2
    ),
    experts=MlpExpert(shared_init=False),
)
GIVEN = SMALL.router
"""For experts that are given."""
LIST = ExpertList(each=(MlpExpert(), CnnExpert(), IdentityExpert(), ZeroExpert()))
KINDS: dict[str, Expert] = {
    "mlp": MlpExpert(),
    "relu": MlpExpert(activation="relu", mlp_dim=5),
    "gated_mlp": GatedMlpExpert(),
    "cnn": CnnExpert(),
    "attention": AttentionExpert(num_heads=2),
    "identity": IdentityExpert(),
    "zero": ZeroExpert(),
    "constant": ConstantExpert(),
    "list": LIST,
}
ACTIVATIONS = {
    "gelu_tanh": gelu,
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
}

OneExpert = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""One expert: tokens (c, d), the image and the position of each -> outputs (c, x)."""


def layer_of(experts: Expert, config: MoEConfig = SMALL, tokens: int = N) -> MoE:
    """A layer whose parameters are all random."""
    config = replace(config, experts=experts)
    layer = nnx.eval_shape(lambda: MoE.from_config(config, D, 7, tokens, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    state = nnx.state(layer, nnx.Param)
    nnx.update(layer, jax.tree.map(lambda x: jnp.float32(rng.normal(size=x.shape)), state))
    return layer


def in_float64(experts: Any) -> list[OneExpert]:
    """Each expert of a layer, as obvious NumPy code."""
    if isinstance(experts, MixedExperts):
        return [expert for kind in experts.kinds for expert in in_float64(kind)]
    params = jax.device_get(nnx.to_pure_dict(nnx.state(experts)))
    each = [
        jax.tree.map(lambda x, i=i: np.float64(x[i]), params) for i in range(experts.num_experts)
    ]
    if isinstance(experts, StackedMlps):
        act, gated = ACTIVATIONS[experts.hidden.activation], experts.hidden.gated
        return [lambda x, i, p, own=own: mlp(x, own, act, gated) for own in each]
    expert = BY_NUMPY[type(experts.stacked).__name__]
    return [
        functools.partial(expert, own.get("stacked", {}))
        for own in each or [{}] * experts.num_experts
    ]


BY_NUMPY: dict[str, Callable[..., np.ndarray]] = {
    "Cnn": lambda own, x, images, positions: cnn(x, images, positions, own),
    "Attention": lambda own, x, images, positions: attention(x, images, own["attention"]),
    "Identity": lambda own, x, images, positions: x,
    "Zero": lambda own, x, images, positions: 0 * x,
    "Constant": lambda own, x, images, positions: constant(x, own),
}
"""Parameters of one expert, and the arguments of ``OneExpert``, by the class of its module."""


def mlp(x: np.ndarray, own: Any, act: Callable[..., np.ndarray], gated: bool) -> np.ndarray:
    hidden = x @ own["up"]["kernel"] + own["up"]["bias"]
    f = hidden.shape[-1] // 2
    hidden = act(hidden[:, :f]) * hidden[:, f:] if gated else act(hidden)
    return hidden @ own["down"]["kernel"] + own["down"]["bias"]


def constant(x: np.ndarray, own: Any) -> np.ndarray:
    one, two = np.split(softmax(x @ own["mix"]["kernel"], axis=-1), 2, axis=-1)
    return one * x + two * own["vector"]


def cnn(x: np.ndarray, images: np.ndarray, positions: np.ndarray, own: Any) -> np.ndarray:
    """Each token adds to its neighbors' sums; the class token, position 0, has none."""
    kernel, out = own["depthwise"]["kernel"], np.zeros_like(x)  # 3 3 1 d
    place = [divmod(p - 1, 2) if p else None for p in positions]
    for i, j in np.ndindex(len(x), len(x)):
        if images[i] == images[j] and (i == j or (place[i] and place[j])):
            row, column = (0, 0) if i == j else np.subtract(place[j], place[i])
            out[i] += x[j] * kernel[1 + row, 1 + column, 0]
    hidden = gelu(out + own["depthwise"]["bias"])
    return hidden @ own["pointwise"]["kernel"] + own["pointwise"]["bias"]


def attention(x: np.ndarray, images: np.ndarray, own: Any) -> np.ndarray:
    """One token at a time attends to the tokens of its image."""
    query, key, value = (
        np.einsum("cd,daz->caz", x, own[name]["kernel"]) + own[name]["bias"]
        for name in ("query", "key", "value")
    )
    out = np.zeros_like(value)
    for i in range(len(x)):
        same = images == images[i]
        scores = np.einsum("az,caz->ac", query[i], key[same]) / math.sqrt(query.shape[-1])
        out[i] = np.einsum("ac,caz->az", softmax(scores, axis=-1), value[same])
    return np.einsum("caz,azd->cd", out, own["out"]["kernel"]) + own["out"]["bias"]


def by_loop(experts: list[OneExpert], tokens: np.ndarray, record: Record, n: int = N) -> np.ndarray:
    """The outputs of a layer for given decisions; each expert gets exactly its tokens."""
    groups, s, _ = record.gates.shape
    rows = np.zeros((groups * s, tokens.shape[-1]))
    rows[: tokens.size // tokens.shape[-1]] = np.reshape(tokens, (-1, tokens.shape[-1]))
    out: Any = 0.0
    chosen = np.asarray(record.routing.experts)
    kept, weights = np.asarray(record.routing.kept), np.asarray(record.routing.weights, float)
    for g, e in np.ndindex(groups, len(experts)):
        token, rank = np.nonzero((chosen[g] == e) & kept[g])
        if len(token):
            y = experts[e](rows[g * s + token], token // n, token % n)
            out = out if isinstance(out, np.ndarray) else np.zeros((groups, s, y.shape[-1]))
            out[g, token] += weights[g, token, rank][:, None] * y
    return out.reshape(groups * s, -1)


@nnx.jit
def loss_and_outputs(layer: MoE, tokens: jax.Array, mask: jax.Array, target: jax.Array) -> Any:
    """Outputs, record, and the gradient of sum(target * outputs)."""

    def loss(layer: MoE, tokens: jax.Array) -> Any:
        y, record = layer.forward(tokens, mask=mask)
        return (y * target).sum(), (y, record)

    gradient = nnx.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, results), (by_layer, by_token) = gradient(layer, tokens)
    return *results, (nnx.state(by_layer), by_token)  # by_layer is a state, or in time a module


@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_each_kind_equal_a_loop_over_groups_and_experts(kind: str) -> None:
    """Some choices are dropped, some slots are empty, and one group has padding."""
    layer = layer_of(KINDS[kind])
    target = jnp.float32(RNG.normal(size=TOKENS.shape))
    y, record, (gradients, by_token) = loss_and_outputs(layer, TOKENS, MASK, target)
    routing = record.routing
    assert routing.dropped.any() and (routing.tokens == record.gates.shape[1]).any()
    assert not record.valid.all() and record.gates.shape[0] > 1
    expected = by_loop(in_float64(layer.experts), TOKENS, record)[: y.size // D]
    np.testing.assert_allclose(y, expected.reshape(y.shape), rtol=1e-4, atol=1e-4)
    assert (np.asarray(y)[-1] == 0).all()  # padding takes no slot

    # The gradient reaches the gate and every expert, and no padding.
    assert (np.asarray(by_token)[-1] == 0).all()
    gate = np.abs(gradients["gate"]["kernel"][...])
    assert (gate.max() == 0) == (kind == "zero")
    for path, gradient in nnx.to_flat_state(gradients):
        if path[0] == "experts" and path[-2:] != ("key", "bias"):  # a key's bias changes nothing
            sizes = np.abs(gradient[...])
            assert (sizes.reshape(len(sizes), -1).max(-1) > 0).all(), path


@pytest.mark.parametrize("kind", ["relu", "gated_mlp"])
def test_the_three_implementations_of_mlps_agree_with_their_gradients(kind: str) -> None:
    target, results = jnp.float32(RNG.normal(size=TOKENS.shape)), []
    for implementation in ("batched", "blocked", "ragged"):
        layer = layer_of(replace(KINDS[kind], implementation=implementation))
        results.append(loss_and_outputs(layer, TOKENS, MASK, target))
    for other in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), other, results[0]
        )


@pytest.mark.parametrize(
    ("capacity", "chosen"),
    [
        (3, {"cpu": "blocked", "gpu": "batched", "tpu": "batched"}),
        (4, {"cpu": "blocked", "gpu": "ragged", "tpu": "ragged"}),
    ],
)
def test_auto_is_chosen_by_the_slots_for_a_choice_and_by_the_platform(
    capacity: int, chosen: dict[str, str]
) -> None:
    experts = StackedMlps(4, 2, 3, rngs=nnx.Rngs(0))
    choices = jnp.zeros((1, 10, 1), int)
    routing = Routing(choices, choices, jnp.zeros((1, 4, capacity), int), choices.astype(float))
    assert {name: experts.implementation_for(routing, name) for name in chosen} == chosen
    by_rows = {name: experts.implementation_for(routing, name, rows=True) for name in chosen}
    assert by_rows == {"cpu": "blocked", "gpu": "ragged", "tpu": "ragged"}


@pytest.mark.parametrize("kind", ["cnn", "attention"])
def test_experts_that_mix_tokens_see_neither_empty_slots_nor_padding(kind: str) -> None:
    results = []
    for capacity, padding in ((5, 0.0), (9, np.nan)):  # with 5, no choice of 10 tokens is dropped
        config = replace(SMALL, router=dict(k=1, capacity=capacity))
        tokens = np.where(MASK[..., None], TOKENS, padding).astype(np.float32)
        layer = layer_of(KINDS[kind], config)
        layer.gate.kernel[...] = jnp.eye(D, E)
        tokens[:, :, :E] = np.eye(E)[np.arange(N) % E] * 9  # at most 2 tokens of an image each
        y, record = nnx.jit(MoE.forward)(layer, jnp.asarray(tokens), mask=MASK)
        assert not record.routing.dropped.any()
        results.append(y[:-1])
    np.testing.assert_allclose(*results, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["cnn", "attention"])
def test_an_expert_mixes_tokens_of_the_same_image_in_its_slots_only(kind: str) -> None:
    """By the gradient of one output with respect to all tokens, for a given routing."""
    layer = layer_of(KINDS[kind], replace(SMALL, router=dict(k=1, dropless=True)))

    @jax.jit
    def reached(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        record = layer.forward(tokens)[1]
        decision = Decision(record.gates, record.routing, record.losses)

        def outputs(t: jax.Array) -> jax.Array:
            return layer.forward(t, decide=lambda *_: decision)[0].sum(-1)

        return record.routing.experts, jnp.abs(jax.jacrev(outputs)(tokens)).sum(-1)  # b n b n

    experts, by_image = map(np.asarray, reached(TOKENS))
    chosen = experts[..., 0].reshape(-1, N)[:B]
    for b, i, c, j in np.ndindex(B, N, B, N):
        together = b == c and chosen[b, i] == chosen[c, j]
        if kind == "cnn" and (i == 0) != (j == 0):  # a class token has no neighbors
            together = False
        assert (by_image[b, i, c, j] > 0) == together, (b, i, c, j)


def test_a_cnn_needs_a_square_grid() -> None:
    for n, fits in ((4, True), (5, True), (6, False), (9, True), (12, False)):
        layer, tokens = layer_of(CnnExpert(), tokens=n), jnp.ones((2, n, D))
        if fits:
            assert jax.eval_shape(layer, tokens).shape == tokens.shape
        else:
            with pytest.raises(UsageError, match=f"square grid of patches, .* has {n} tokens"):
                jax.eval_shape(layer, tokens)
    cut = MoE(layer_of(CnnExpert(), tokens=9).experts, gate(), group=5)
    with pytest.raises(UsageError, match="needs whole images, and a group has 5 of the 9 tokens"):
        jax.eval_shape(cut, jnp.ones((2, 9, D)))


def test_a_model_with_cnn_experts_refuses_images_that_are_not_square() -> None:
    """2 x 8 patches are as many tokens as 4 x 4, so the experts cannot tell."""
    for kind in ("cnn", "list", "attention"):
        moe = replace(SMALL, experts=KINDS[kind])
        config = ViTConfig(2, 8, 1, 8, 2, 8, 3, sparse_blocks=(0,), moe=moe, pooling="mean")
        run = functools.partial(nnx.eval_shape, ViT.__call__, models.build_abstract(config))
        assert run(jnp.ones((1, 8, 8, 3))).shape == (1, 3)
        if kind == "attention":
            assert run(jnp.ones((1, 4, 16, 3))).shape == (1, 3)
        else:
            with pytest.raises(UsageError, match="images of 2 x 8 patches: experts .* square"):
                run(jnp.ones((1, 4, 16, 3)))


def test_without_a_class_token_a_cnn_reads_the_whole_grid() -> None:
    """With one expert for all tokens, it is the convolution of the images."""
    config = MoEConfig(num_experts=1, router=TokenChoice(k=1, dropless=True, images_per_group=2))
    layer = layer_of(CnnExpert(), config, tokens=9)
    tokens = jnp.float32(RNG.normal(size=(3, 9, D)))

    @nnx.jit
    def run(layer: MoE, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        own = jax.tree.map(lambda x: x[0], nnx.state(layer.experts.stacked))
        module = nnx.merge(nnx.graphdef(layer.experts.stacked), own)
        convolved = module.depthwise(tokens.reshape(3, 3, 3, D)).reshape(3, 9, D)
        return layer(tokens), module.pointwise(nnx.gelu(convolved))

    np.testing.assert_allclose(*run(layer, tokens), rtol=1e-4, atol=1e-4)


def test_experts_start_equal_only_with_shared_init() -> None:
    for kind in ("mlp", "gated_mlp", "cnn", "attention"):
        for shared in (True, False):
            config = replace(SMALL, experts=replace(KINDS[kind], shared_init=shared))
            layer = MoE.from_config(config, D, 7, N, rngs=nnx.Rngs(0))
            for path, param in nnx.to_flat_state(nnx.state(layer.experts)):
                values = np.asarray(param[...])
                if "kernel" in path:
                    assert (values[0] == values[1:]).all() == shared, path


def linears(x: int = D, e: int = E) -> list[nnx.Linear]:
    rngs = nnx.Rngs(2)
    return [nnx.Linear(D, x, bias_init=nnx.initializers.normal(), rngs=rngs) for _ in range(e)]


def gate(e: int = E) -> nnx.Linear:
    return nnx.Linear(D, e, use_bias=False, rngs=nnx.Rngs(3))


def modules_in_float64(modules: list[Any]) -> list[OneExpert]:
    """Modules of linear layers, as obvious NumPy code."""
    return [functools.partial(linear, nnx.to_pure_dict(nnx.state(module))) for module in modules]


def linear(params: Any, x: np.ndarray, *_: Any) -> np.ndarray:
    own = {name: np.float64(values) for name, values in params.items()}
    if "lora_a" in own:
        return x @ own["lora_a"] @ own["lora_b"]
    return x @ own["kernel"] + own["bias"]


@pytest.mark.parametrize("x", [3, 11])
def test_modules_of_several_types_as_experts_may_return_another_width(x: int) -> None:
    experts: list[Any] = linears(x)
    experts[1] = nnx.LoRA(D, 2, x, rngs=nnx.Rngs(0))
    layer = MoE(experts, gate(), GIVEN)
    y, record = nnx.jit(MoE.forward)(layer, TOKENS)
    assert y.shape == (B, N, x)
    expected = by_loop(modules_in_float64(experts), TOKENS, record)[: B * N]
    np.testing.assert_allclose(y.reshape(B * N, -1), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mlp", "gated_mlp", "copies", "spatial", "list"])
def test_outputs_for_the_same_rows_are_those_for_rows_of_each_expert(kind: str) -> None:
    convolutions = [nnx.Conv(D, D, (1, 1), rngs=nnx.Rngs(i)) for i in range(E)]
    modules = linears(D)[:2] + [nnx.Linear(D, D, use_bias=False, rngs=nnx.Rngs(9))] * 2
    made: dict[str, Callable[[], Any]] = {
        "copies": lambda: experts_of(linears(3)),
        "spatial": lambda: Copies(convolutions, spatial=2),
        "list": lambda: experts_of(modules),
    }
    experts = made[kind]() if kind in made else layer_of(KINDS[kind]).experts
    rows = TOKENS.reshape(-1, D)
    expected = experts(jnp.broadcast_to(rows, (1, E, *rows.shape)), Slots(1, len(rows), {}))[0]
    np.testing.assert_allclose(experts.on_same(rows), expected, rtol=1e-5, atol=1e-6)


def test_a_module_given_several_times_makes_experts_that_start_equal() -> None:
    layer = MoE([linears(3)[0]] * E, gate(), TokenChoice(k=1, normalize_weights=True))
    np.testing.assert_allclose(
        nnx.jit(layer)(TOKENS[:1, :4]), linears(3)[0](TOKENS[:1, :4]), rtol=1e-5, atol=1e-5
    )
    assert layer.experts.stacked.kernel.shape == (E, D, 3)  # and are trained apart


@pytest.mark.parametrize("shape", [(D,), (6, D), (2, 3, D), (2, 3, 2, 2, D)])
def test_tokens_may_have_any_rank(shape: tuple[int, ...]) -> None:
    """The axes between the first and the last one are the tokens of an image; (n, d) is one."""
    tokens = jnp.float32(RNG.normal(size=shape))
    layer = MoE(linears(3), gate(), replace(GIVEN, dropless=True))
    y, record = nnx.jit(MoE.forward)(layer, tokens)
    assert y.shape == (*shape[:-1], 3)
    flat = tokens.reshape(shape[0] if len(shape) > 2 else 1, -1, D)
    expected = by_loop(modules_in_float64(linears(3)), flat, record, flat.shape[1])
    np.testing.assert_allclose(y.reshape(-1, 3), expected[: y.size // 3], rtol=1e-4, atol=1e-5)


class Conditional(nnx.Module):
    """Reads more than tokens: per token a time, a label and a tree; the same scale for all."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(D, D, rngs=rngs)
        self.table = nnx.Embed(10, D, rngs=rngs)

    def __call__(
        self,
        tokens: jax.Array,
        scale: jax.Array,
        *,
        time: jax.Array,
        label: jax.Array,
        extra: dict[str, jax.Array],
        shift: float = 0.0,
    ) -> jax.Array:
        y = self.linear(tokens) * scale + self.table(label) * time[..., None]
        return y + extra["matrix"].sum(-1) + shift


class Mixing(Conditional):
    """The same, with all slots of a group at once."""

    takes = ("filled",)

    def __call__(self, tokens: jax.Array, *args: Any, filled: jax.Array, **inputs: Any) -> Any:
        assert filled.shape == tokens.shape[:-1] == inputs["time"].shape
        return super().__call__(tokens, *args, **inputs)


@pytest.mark.parametrize("kind", [Conditional, Mixing])
def test_experts_get_the_rows_of_their_tokens_and_inputs_for_all(kind: Any) -> None:
    rngs = nnx.Rngs(4)
    experts = [kind(rngs) for _ in range(E)]
    layer = MoE(experts, gate(), GIVEN)
    inputs = dict(
        time=jnp.float32(RNG.normal(size=(B, N))),
        label=jnp.asarray(RNG.integers(0, 10, (B, N))),
        extra={"matrix": jnp.float32(RNG.normal(size=(B, N, D, 3)))},
    )
    scale = jnp.arange(1.0, D + 1)
    y, record = nnx.jit(MoE.forward)(layer, TOKENS, scale, per_token=inputs, shift=0.5)
    ones = [Conditional(nnx.Rngs(0)) for _ in range(E)]
    for one, expert in zip(ones, experts, strict=True):
        nnx.update(one, nnx.state(expert))
    flat = jax.tree.map(lambda x: x.reshape(B * N, *x.shape[2:]), inputs)
    each = np.stack([one(TOKENS.reshape(-1, D), scale, **flat, shift=0.5) for one in ones])
    kept, chosen, weights = (
        np.asarray(x).reshape(-1, 2)[: B * N]
        for x in (record.routing.kept, record.routing.experts, record.routing.weights)
    )
    expected = np.zeros((B * N, D))
    for token, rank in zip(*np.nonzero(kept), strict=True):
        expected[token] += weights[token, rank] * each[chosen[token, rank], token]
    np.testing.assert_allclose(y.reshape(-1, D), expected, rtol=1e-4, atol=1e-4)


def test_soft_slots_mix_float_inputs_and_refuse_others() -> None:
    class Scaled(nnx.Module):
        def __call__(self, tokens: jax.Array, *, time: jax.Array) -> jax.Array:
            return tokens * time

    config = MoEConfig(num_experts=2, router=Soft())
    layer = MoE.from_config(config, D, 7, N, rngs=nnx.Rngs(0))
    layer.experts = Copies([Scaled()] * 2)
    y, record = nnx.jit(MoE.forward)(layer, TOKENS, per_token={"time": TOKENS})
    dispatch, combine = (np.float64(x) for x in record.routing)
    slots = np.einsum("gsd,gsec->gecd", TOKENS, dispatch) ** 2
    np.testing.assert_allclose(y, np.einsum("gecd,gsec->gsd", slots, combine), rtol=1e-4, atol=1e-5)
    numbers = {"time": jnp.asarray(np.ones(TOKENS.shape, np.int32))}
    with pytest.raises(UsageError, match="int32 cannot be mixed"):
        jax.eval_shape(functools.partial(layer, per_token=numbers), TOKENS)
    layer.experts = Copies([AnyFilled()] * 2)
    with pytest.raises(UsageError, match="ask for filled need a token in each slot"):
        jax.eval_shape(layer, TOKENS)


class AnyFilled(nnx.Module):
    takes = ("filled",)

    def __call__(self, tokens: jax.Array, *, filled: jax.Array) -> jax.Array:
        return tokens * filled[..., None]


class Sized(nnx.Module):
    takes = ("n",)

    def __call__(self, tokens: jax.Array, *, n: int) -> jax.Array:
        return tokens / n


class Dropping(nnx.Module):
    """A module of a user that knows nothing of this library but what it takes."""

    takes = ("key",)

    def __init__(self) -> None:
        self.scale = nnx.Param(jnp.ones(D))

    def __call__(self, tokens: jax.Array, *, key: jax.Array | None = None) -> jax.Array:
        kept = True if key is None else jax.random.bernoulli(key, 0.5, tokens.shape)
        return jnp.where(kept, tokens * self.scale[...], 0.0)


def test_experts_that_take_a_key_draw_different_masks_in_training_and_none_in_evaluation() -> None:
    router = replace(GIVEN, k=E, dropless=True)
    layer = MoE([Dropping()] * E, gate(), router)
    slots = jnp.ones((1, E, N, D))
    masks = np.asarray(layer.experts(slots, Slots(N, N, {}), jax.random.key(0)))[0]
    assert all((masks[i] != masks[j]).any() for i in range(E) for j in range(i))
    assert 0.2 < masks.mean() < 0.8
    tokens = jnp.ones((2, N, D))
    run = nnx.jit(lambda m, x, key: (m(x), m.forward(x, key=key)[0]))
    (evaluated, first), (_, again) = (run(layer, tokens, jax.random.key(1)) for _ in range(2))
    np.testing.assert_allclose(evaluated, tokens, rtol=1e-5)
    assert (first != tokens).any()
    np.testing.assert_array_equal(first, again)


def test_the_class_tokens_alone_get_the_same_outputs() -> None:
    """A last block needs no other token; experts that mix tokens still read all of them."""
    for experts in (KINDS["list"], KINDS["gated_mlp"]):
        layer = layer_of(experts)
        run = nnx.jit(lambda m, x: (m(x), m.forward(x, class_token_only=True)[0]))
        whole, alone = run(layer, TOKENS)
        np.testing.assert_allclose(alone, whole[:, :1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 2.5], ids=["plain", "gated_and_scaled"])
def test_a_shared_expert_adds_its_outputs_for_every_token_dropped_or_not(scale: float) -> None:
    gated, router = scale != 1, dict(capacity=1)
    config = replace(SMALL, shared_experts=2, router=router, shared_gate=gated, routed_scale=scale)
    shared = MoE.from_config(config, D, 7, N, rngs=nnx.Rngs(0))
    routed = MoE(nnx.clone(shared.experts), nnx.clone(shared.gate), config.router)

    @nnx.jit
    def outputs(shared: MoE, routed: MoE) -> Any:
        whole, record = shared.forward(TOKENS, mask=MASK)
        alone, _ = shared.forward(TOKENS, mask=MASK, class_token_only=True)
        return whole, alone, routed(TOKENS, mask=MASK), record.routing.dropped

    with_shared, alone, without, dropped = outputs(shared, routed)
    assert dropped.any()
    own = jax.tree.map(lambda x: np.float64(x[0]), nnx.to_pure_dict(nnx.state(shared.shared)))
    assert own["up"]["kernel"].shape == (D, 2 * 7)
    expected = mlp(np.float64(TOKENS), own, gelu, False) * np.asarray(MASK)[..., None]
    if gated:
        expected *= expit(np.float64(TOKENS) @ np.float64(shared.shared_gate.kernel[...]))
    np.testing.assert_allclose(with_shared - scale * without, expected, atol=1e-5)
    np.testing.assert_allclose(alone, with_shared[:, :1], atol=1e-5)


def test_expert_choice_works_with_experts_that_mix_tokens() -> None:
    layer = layer_of(LIST, replace(SMALL, router=ExpertChoice(noise_std=0.0)))
    y, record = nnx.jit(MoE.forward)(layer, TOKENS, mask=MASK)
    expected = by_loop(in_float64(layer.experts), TOKENS, record)[: B * N]
    np.testing.assert_allclose(y.reshape(-1, D), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (list, "experts is empty"),
        (lambda: [nnx.relu] * E, r"expert 0 \(custom_jvp\) is not an nnx.Module"),
        (lambda: [*linears()[1:], 3], r"expert 3 \(int\) is not an nnx.Module"),
    ],
    ids=["none", "function", "number"],
)
def test_what_cannot_be_an_expert_is_named(experts: Callable[[], list[Any]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        MoE(experts(), gate())


class FirstOf(nnx.Module):
    def __call__(self, tokens: jax.Array) -> jax.Array:
        return tokens[..., 0]


class FirstRow(nnx.Module):
    def __call__(self, rows: jax.Array) -> jax.Array:
        return rows[:1]


@pytest.mark.parametrize(
    ("experts", "gate", "message"),
    [
        (lambda: [*linears(3)[1:], linears(5)[0]], gate, r"widths, \[3, 5\]"),
        (
            linears,
            lambda: gate(E + 1),
            rf"the gate makes logits \(5, 5, 5\).*\(b, n, e\) with e = {E}",
        ),
        (linears, FirstOf, r"the gate makes logits \(5, 5\)"),
        (linears, lambda: None, "token_choice router reads logits: give a gate"),
        (
            lambda: [nnx.Linear(7, D, rngs=nnx.Rngs(0))] * E,
            gate,
            r"expert Linear cannot take .*, 8\)",
        ),
        (
            lambda: [FirstRow()] * E,
            gate,
            r"expert FirstRow makes \(1, 8\) from .*: only the last axis",
        ),
        (lambda: [FirstOf()] * E, gate, r"expert FirstOf makes \(\d+,\) from"),
        (
            lambda: StackedMlps(E, 7, 5, rngs=nnx.Rngs(0)),
            gate,
            "MLP experts of width 7 cannot take",
        ),
        (linears, lambda: nnx.Linear(7, E, rngs=nnx.Rngs(0)), r"the gate cannot take .*, 8\)"),
    ],
    ids=[
        *("outputs", "logits", "rank", "no gate", "inputs", "rows", "axes"),
        *("inputs of MLPs", "inputs of the gate"),
    ],
)
def test_widths_that_do_not_fit_are_named(
    experts: Callable[[], Any], gate: Callable[[], Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        jax.eval_shape(MoE(experts(), gate(), TokenChoice(k=1)), TOKENS)
    assert "\n" not in str(caught.value)


def test_inputs_and_shared_experts_that_do_not_fit_the_tokens_are_named() -> None:
    layer = MoE(linears(), gate(), TokenChoice(k=1))
    for inputs, message in (
        ({"hour": TOKENS[:, :3]}, r"time of shape \(5, 3, 8\): use \(5, 5, ...\), a row for each"),
        ([1.0, 2.0], "time has a float: give arrays"),
    ):
        with pytest.raises(UsageError, match=message):
            layer.forward(TOKENS, per_token={"time": inputs})
    with pytest.raises(UsageError, match="the shared expert has no slots: it cannot ask for fill"):
        MoE(linears(), gate(), TokenChoice(k=1), shared=AnyFilled())
    with pytest.raises(UsageError, match="the shared expert has no slots: it cannot ask for n$"):
        MoE(linears(), gate(), TokenChoice(k=1), shared=Sized())
    layer = MoE(linears(), gate(), TokenChoice(k=1), shared=linears(3)[0])
    with pytest.raises(UsageError, match="shared expert has outputs of width 3, the others of 8"):
        jax.eval_shape(layer, TOKENS)


@pytest.mark.parametrize("name", ["filled", "images", "positions", "n", "s", "key"])
def test_what_experts_get_from_the_layer_is_no_name_of_an_input(name: str) -> None:
    class Taking(nnx.Module):
        takes = (name,)

    layer, message = MoE([Taking()] * E, gate(4)), f"experts get {name} from the layer"
    with pytest.raises(UsageError, match=message):
        jax.eval_shape(lambda x: layer(x, per_token={name: x}), TOKENS)
    if name != "key":  # the layer itself takes a key
        with pytest.raises(UsageError, match=message):
            jax.eval_shape(lambda x: layer(x, **{name: 1.0}), TOKENS)


def test_configs_that_contradict_themselves_are_refused() -> None:
    for changes, message in (
        (dict(num_experts=3), "num_experts=3.*list as many experts"),
        (dict(router=dict(k=5)), "k=5"),
        (dict(router=Soft()), "experts.kind=list with .*kind=soft.*mixtures"),
    ):
        with pytest.raises(UsageError, match=message):
            replace(SMALL, experts=LIST, **changes)
    with pytest.raises(UsageError, match="each.1.implementation=ragged: the experts of a list"):
        ExpertList(each=(MlpExpert(), GatedMlpExpert(implementation="ragged")))
    with pytest.raises(UsageError, match="num_experts=1: lower k or add experts"):
        MoE(linears()[:1], gate(1))
    with pytest.raises(UsageError, match=f"exchange.hot_experts=100: use at most {E}"):
        MoE(linears(), gate(), exchange=Exchange(hot_experts=100))
    for implementation in ("batched", "auto"):
        layer = layer_of(MlpExpert(implementation=implementation))
        with pytest.raises(UsageError, match="MLP experts read tokens only: leave out scale, time"):
            jax.eval_shape(lambda x, m=layer: m(x, per_token={"time": x}, scale=1.0), TOKENS)
