"""A layer for tokens of any shape: groups by tokens, masks, inputs of gates, what fills slots.

The oracles are the same layer on each sequence alone, and modules that are called on their rows.
"""

import dataclasses
import logging
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from vmoe.config import (
    BiasBalanced,
    ByTask,
    ExpertRace,
    Hash,
    MlpExpert,
    MoEConfig,
    Random,
    ReLU,
    Soft,
    Switch,
    TokenChoice,
    TopP,
    ViTConfig,
    replace,
)
from vmoe.errors import UsageError
from vmoe.nn.experts import StackedMlps
from vmoe.nn.moe import MoE
from vmoe.routing.groups import Groups
from vmoe.surgery import moefy

D, E = 8, 4
RNG = np.random.default_rng(0)
QUIET = TokenChoice(k=2, noise_std=0.0)
ROOMY = replace(QUIET, dropless=True)
LENGTHS = (5, 3, 0, 2)
"""Of the sequences of a padded batch of 4 x 6 tokens."""
MASK = np.arange(6) < np.array(LENGTHS)[:, None]
PADDED = np.float32(RNG.normal(size=(4, 6, D)))

forward = nnx.jit(MoE.forward, static_argnames=("class_token_only",))


def linears(e: int = E) -> list[nnx.Linear]:
    bias = nnx.initializers.normal()
    return [nnx.Linear(D, D, bias_init=bias, rngs=nnx.Rngs(i)) for i in range(e)]


def gate(e: int = E) -> nnx.Linear:
    return nnx.Linear(D, e, use_bias=False, rngs=nnx.Rngs(9))


@pytest.mark.parametrize(
    ("b", "n", "size", "devices", "expected"),
    [
        (8, 3, 24, 1, (1, 24)),
        (13, 3, 26, 1, (2, 21)),  # at most 8 whole sequences, as even as possible
        (9, 2, 3, 1, (9, 2)),
        (16, 3, 12, 2, (4, 12)),
        (10, 3, 6, 2, (6, 6)),  # three groups on each device, the last one with padding
        (2, 10, 4, 1, (6, 4)),  # each sequence is cut into three parts, the last one with padding
        (1, 10, 100, 4, (4, 3)),  # the only sequence is shared by all devices
        (0, 3, 24, 1, (1, 3)),
        (1, 0, 24, 1, (1, 1)),
    ],
)
def test_groups_have_at_most_so_many_tokens_and_are_as_few_and_even_as_possible(
    b: int, n: int, size: int, devices: int, expected: tuple[int, int]
) -> None:
    groups = Groups.of(b, n, size, devices)
    assert (groups.g, groups.s) == expected
    tokens = np.arange(1, b * n * 2 + 1).reshape(b, n, 2)
    laid = np.asarray(groups.split(jnp.asarray(tokens)))
    np.testing.assert_array_equal(groups.join(jnp.asarray(laid)), tokens)
    real = laid.any(-1)
    assert real.sum() == b * n and laid.shape == (*expected, 2)
    np.testing.assert_array_equal(laid[real], tokens.reshape(-1, 2))  # in their order
    positions = np.broadcast_to(np.arange(n), (b, n)).reshape(-1)
    np.testing.assert_array_equal(np.asarray(groups.positions)[real], positions)


def test_a_layer_without_jit_compiles_its_parts_and_not_each_of_their_operations(
    caplog: pytest.LogCaptureFixture,
) -> None:
    moe, tokens = MoE(linears(), gate(), ROOMY), jnp.ones((1, 67, D))
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        moe(tokens)  # of a length that no other test has
    compiled = re.findall(r"Compiling (?:jit\()?(\w+)", caplog.text)
    assert {"_decide", "combine"} <= set(compiled) and len(compiled) < 60
    caplog.clear()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        moe(tokens)
    assert "Compiling" not in caplog.text


def test_rows_are_one_sequence_with_slots_for_about_their_choices() -> None:
    e, rows = 64, jnp.float32(RNG.normal(size=(512, D)))
    layer = MoE(linears(e), gate(e), QUIET)
    outputs, record = forward(layer, rows)
    assert outputs.shape == rows.shape and record.valid.shape == (1, 512)
    assert record.routing.choices.size <= 1.3 * record.routing.slots.size
    np.testing.assert_array_equal(outputs, forward(layer, rows[None])[0][0])
    cut = forward(MoE(linears(e), gate(e), QUIET, group=100), rows)[1]
    assert cut.valid.shape == (6, 86) and np.asarray(cut.valid).sum() == 512


@pytest.mark.parametrize("shape", [(400,), (20, 20)])
@pytest.mark.parametrize("router", [Hash(k=2), Random(k=2)])
def test_routers_without_a_gate_spread_the_tokens_of_any_shape(
    router: Any, shape: tuple[int, ...]
) -> None:
    record = forward(MoE(linears(), None, router), jnp.ones((*shape, D)))[1]
    experts = np.asarray(record.routing.experts)[np.asarray(record.valid)]
    counts = np.bincount(experts.ravel(), minlength=E)
    assert counts.min() > 0.7 * counts.mean() and record.routing.dropped.mean() < 0.1


def test_positions_go_on_where_a_sequence_is_cut() -> None:
    whole, cut = (
        forward(MoE(linears(), None, Hash(k=1), group=size), jnp.ones((50, D)))[1]
        for size in (50, 20)
    )
    experts = np.asarray(cut.routing.experts)[np.asarray(cut.valid)]
    np.testing.assert_array_equal(experts[:, 0], np.asarray(whole.routing.experts)[0, :, 0])


def alone(layer: MoE, **inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs of the layer for the tokens of each sequence by itself."""
    return [
        np.asarray(
            forward(
                layer,
                jnp.asarray(PADDED[i, :n]),
                per_token={name: jnp.asarray(x[i, :n]) for name, x in inputs.items()},
            )[0]
        )
        for i, n in enumerate(LENGTHS)
        if n
    ]


@pytest.mark.parametrize("padding", [0.0, np.nan])
@pytest.mark.parametrize("own", [False, True], ids=["modules", "mlps"])
def test_a_padded_batch_equals_its_sequences_alone(own: bool, padding: float) -> None:
    """Without capacity; padding has outputs of zero, and counts in no loss."""
    tokens = np.where(MASK[..., None], PADDED, np.float32(padding))
    shared = nnx.Linear(D, D, rngs=nnx.Rngs(3))
    layer = MoE(linears(), gate(), ROOMY, shared=shared)
    if own:
        own = dict(shared_experts=1, experts=MlpExpert(shared_init=False))
        config = MoEConfig(num_experts=E, router=ROOMY, **own)
        layer = MoE.from_config(config, D, 7, 6, rngs=nnx.Rngs(0))
    outputs, record = forward(layer, jnp.asarray(tokens), mask=jnp.asarray(MASK))
    for i, ours in zip(np.flatnonzero(LENGTHS), alone(layer), strict=True):
        np.testing.assert_allclose(outputs[i, : LENGTHS[i]], ours, rtol=1e-5, atol=1e-5)
    assert (np.asarray(outputs)[~MASK] == 0).all()
    assert record.valid.sum() == record.routing.kept.sum() / 2 == MASK.sum()
    together = forward(layer, jnp.asarray(PADDED[MASK]))[1]  # one ragged batch
    np.testing.assert_allclose(record.aux_loss, together.aux_loss, rtol=1e-5)


def test_a_random_subset_of_patches_equals_the_subset_without_the_others() -> None:
    """As in a masked autoencoder, where images keep equally many patches."""
    keep = np.sort(np.argsort(RNG.random((4, 6)), axis=1)[:, :2], axis=1)
    mask = np.zeros((4, 6), bool)
    np.put_along_axis(mask, keep, True, axis=1)
    layer = MoE(linears(), gate(), replace(QUIET, capacity=3))
    outputs, record = forward(layer, jnp.asarray(PADDED), mask=jnp.asarray(mask))
    kept = np.take_along_axis(PADDED, keep[..., None], axis=1)
    expected, of_kept = forward(layer, jnp.asarray(kept))
    ours = np.take_along_axis(np.asarray(outputs), keep[..., None], axis=1)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(record.aux_loss, of_kept.aux_loss, rtol=1e-5)
    assert of_kept.routing.dropped.any()
    assert record.routing.dropped.sum() == of_kept.routing.dropped.sum()


def test_a_mask_that_does_not_fit_is_refused() -> None:
    layer = MoE(linears(), gate())
    for mask, message in (
        (MASK[:, 0], r"mask of shape \(4,\) and dtype bool: use \(4, 6\) and bool"),
        (np.float32(MASK), r"mask of shape \(4, 6\) and dtype float32: use"),
    ):
        with pytest.raises(UsageError, match=message):
            layer.forward(jnp.asarray(PADDED), mask=jnp.asarray(mask))


class OfImages(nnx.Module):
    """A gate that chooses experts by the mean of an image, without padding."""

    takes = ("mask",)

    def __init__(self) -> None:
        self.linear = gate()

    def __call__(self, tokens: jax.Array, *, mask: jax.Array) -> jax.Array:
        total = (tokens * mask[..., None]).sum(1, keepdims=True)
        mean = total / jnp.maximum(mask.sum(1), 1)[:, None, None]
        return jnp.broadcast_to(self.linear(mean), (*mask.shape, E))


def test_a_gate_sees_images_and_not_groups() -> None:
    """All tokens of an image have its experts, whatever shares their group."""
    layer = MoE(linears(), OfImages(), ROOMY)
    outputs, record = forward(layer, jnp.asarray(PADDED), mask=jnp.asarray(MASK))
    chosen = np.asarray(record.routing.experts).reshape(4, 6, 2)
    means = np.stack([PADDED[i, :n].mean(0) for i, n in enumerate(LENGTHS) if n])
    expected = np.argsort(-means @ layer.gate.linear.kernel[...], axis=-1)[:, :2]
    for i, experts in zip(np.flatnonzero(LENGTHS), expected, strict=True):
        assert (chosen[i, : LENGTHS[i]] == experts).all()
    assert len({tuple(experts) for experts in expected.tolist()}) > 1
    for i, ours in zip(np.flatnonzero(LENGTHS), alone(layer), strict=True):
        np.testing.assert_allclose(outputs[i, : LENGTHS[i]], ours, rtol=1e-5, atol=1e-5)


class OfTask(nnx.Module):
    """A gate that adds logits of each token's task, and reads all else that gates can ask for."""

    takes = ("task", "images", "positions", "n", "s", "key")

    seen: ClassVar[list[Any]] = []

    def __init__(self) -> None:
        self.linear, self.table = gate(), nnx.Embed(3, E, rngs=nnx.Rngs(7))

    def __call__(self, tokens: jax.Array, *, task: jax.Array, **known: Any) -> jax.Array:
        self.seen.append(known)
        return self.linear(tokens) + 9 * self.table(task)


class Scaled(nnx.Module):
    """An expert with an input per token of its own."""

    def __init__(self, rngs: nnx.Rngs):
        self.linear = nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, tokens: jax.Array, *, scale: dict[str, jax.Array]) -> jax.Array:
        return self.linear(tokens) * scale["by"]


@pytest.mark.slow
def test_gates_get_the_inputs_per_token_that_they_name_and_experts_the_others() -> None:
    """FastMoE's layers with several inputs."""
    experts = [Scaled(nnx.Rngs(i)) for i in range(E)]
    layer, seen = MoE(experts, OfTask(), ROOMY), OfTask.seen
    task = RNG.integers(0, 3, (4, 6))
    scale = np.float32(RNG.normal(size=(4, 6, 1)))
    inputs = {"task": jnp.asarray(task), "scale": {"by": jnp.asarray(scale)}}
    outputs, record = layer.forward(jnp.asarray(PADDED), per_token=inputs)
    logits = PADDED @ layer.gate.linear.kernel[...] + 9 * layer.gate.table.embedding[task]
    np.testing.assert_allclose(record.logits[0], logits.reshape(24, E), rtol=1e-4, atol=1e-5)
    gates = np.asarray(jax.nn.softmax(logits))
    each = np.stack([expert.linear(PADDED) for expert in experts], axis=-1) * scale[..., None]
    top = np.argsort(-logits, axis=-1)[..., :2]
    weights = np.zeros_like(gates)
    np.put_along_axis(weights, top, np.take_along_axis(gates, top, -1), -1)
    np.testing.assert_allclose(outputs, (each * weights[..., None, :]).sum(-1), atol=1e-4)

    (known,) = seen
    assert (known["n"], known["s"], known["key"]) == (6, 24, None)
    np.testing.assert_array_equal(known["positions"], np.tile(np.arange(6), (4, 1)))
    np.testing.assert_array_equal(known["images"], np.tile(np.arange(4)[:, None], (1, 6)))
    layer.forward(jnp.asarray(PADDED), per_token=inputs, key=jax.random.key(0))
    assert seen[1]["key"].shape == ()


@pytest.mark.parametrize("group", [None, 3])
def test_the_task_of_a_token_is_its_expert_and_without_a_known_task_it_has_none(
    group: int | None,
) -> None:
    """The oracle masks the outputs of all experts, as ViTPose++ does."""
    experts = linears()
    layer = MoE(experts, None, ByTask(), group=group)
    task = np.tile([[0], [E - 1], [1], [-1]], (1, 6))
    task[2, 4:] = (0, E)
    outputs, record = layer.forward(jnp.asarray(PADDED), per_token={"task": jnp.asarray(task)})
    expected = sum((task == i)[..., None] * each(PADDED) for i, each in enumerate(experts))
    np.testing.assert_allclose(outputs, expected, atol=1e-5)
    assert not record.routing.dropped.any()
    with pytest.raises(UsageError, match="ByTask takes task: give per_token="):
        layer(jnp.asarray(PADDED))
    for wrong in (task / 1.0, task[..., None]):
        with pytest.raises(UsageError, match="task has .*: give one integer for each token"):
            layer(jnp.asarray(PADDED), per_token={"task": jnp.asarray(wrong)})
    with pytest.raises(UsageError, match="capacity_factor=0.5: it needs dropless=False"):
        ByTask(capacity_factor=0.5)
    assert ByTask(capacity_factor=0.5, dropless=False).slots(8, 4) < 8
    with pytest.raises(UsageError, match="a ByTask router reads no logits"):
        MoE(experts, gate(), ByTask())
    with pytest.raises(UsageError, match="model.moe.router=ByTask: a ViT has no task for each"):
        ViTConfig(sparse_blocks=(1,), moe=MoEConfig(router=ByTask()))
    with pytest.raises(UsageError, match="router=ByTask: it reads task for each token"):
        moefy(
            nnx.Sequential(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), select=nnx.Linear, router=ByTask()
        )


def test_a_gate_and_a_router_may_read_the_same_input() -> None:
    @dataclasses.dataclass(frozen=True)
    class ByTaskAndGate(TokenChoice):
        takes = ("task",)

    class TaskGate(nnx.Linear):
        takes = ("task",)

        def __call__(self, tokens: jax.Array, *, task: jax.Array) -> jax.Array:
            return super().__call__(tokens) + task[..., None]

    router = ByTaskAndGate(k=2, noise_std=0.0, dropless=True)
    layer = MoE(linears(), TaskGate(D, E, rngs=nnx.Rngs(0)), router)
    task = jnp.ones(PADDED.shape[:2], jnp.int32)
    assert layer(jnp.asarray(PADDED), per_token={"task": task}).shape == PADDED.shape


class SeveralOutputs(nnx.Module):
    """As FastMoE's experts with ``mimo``, which may return a list of arrays."""

    def __init__(self, seed: int):
        rngs = nnx.Rngs(seed)
        self.first, self.second = nnx.Linear(D, D, rngs=rngs), nnx.Linear(D, 3, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return jnp.concatenate([self.first(x), self.second(x)], axis=-1)


def test_an_expert_with_several_outputs_joins_them_along_the_last_axis() -> None:
    """As two layers that share the gate, each with one of the outputs."""
    layer = MoE([SeveralOutputs(i) for i in range(E)], gate(), ROOMY)
    outputs = jnp.split(layer(jnp.asarray(PADDED)), [D], axis=-1)
    for part, found in zip(("first", "second"), outputs, strict=True):
        alone = MoE([getattr(SeveralOutputs(i), part) for i in range(E)], gate(), ROOMY)
        np.testing.assert_allclose(found, alone(jnp.asarray(PADDED)), atol=1e-6)


class AsText(nnx.Linear):
    takes = "mask"


def test_what_a_gate_takes_is_a_tuple_of_names() -> None:
    layer = MoE(linears(), AsText(D, E, rngs=nnx.Rngs(0)))
    with pytest.raises(UsageError, match=r"the gate's takes is 'mask': use a tuple of names"):
        layer.forward(jnp.asarray(PADDED))


@pytest.mark.parametrize("router", [ReLU(target_k=1), TopP(), ExpertRace(), BiasBalanced()])
def test_a_step_without_tokens_changes_no_state(router: Any) -> None:
    layer, key = MoE(linears(), gate(), router), jax.random.key(0)
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(layer.state)))
    nothing = forward(layer, jnp.asarray(PADDED), mask=jnp.zeros((4, 6), bool), key=key)[1]
    nnx.jit(MoE.update_state)(layer, nothing)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(layer.state)), before)
    nnx.jit(MoE.update_state)(layer, forward(layer, jnp.asarray(PADDED), key=key)[1])
    after = nnx.to_pure_dict(nnx.state(layer.state))
    assert any(np.any(after[name] != before[name]) for name in after)


@pytest.mark.slow
def test_the_state_of_a_threshold_needs_the_routing_of_a_training_step() -> None:
    layer = MoE(linears(), gate(), ExpertRace())
    with pytest.raises(UsageError, match="of evaluation: give the layer a key in training"):
        layer.update_state(layer.forward(jnp.asarray(PADDED))[1])


def test_an_input_that_the_gate_takes_and_nobody_gives_is_named() -> None:
    layer = MoE(linears(), OfTask())
    message = (
        r"^the gate takes task: give per_token=\{...\} .* from the layer it gets mask, images, "
    )
    with pytest.raises(UsageError, match=message):
        layer.forward(jnp.asarray(PADDED))


class Normed(nnx.Module):
    """Has statistics of its rows, and gradients through them."""

    def __init__(self, rngs: nnx.Rngs, x: int = D):
        self.linear = nnx.Linear(D, x, rngs=rngs)
        self.norm = nnx.BatchNorm(x, momentum=0.0, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return self.norm(self.linear(tokens))


class ByPosition(nnx.Module):
    takes = ("positions",)

    def __call__(self, tokens: jax.Array, *, positions: jax.Array) -> jax.Array:
        return jax.nn.one_hot(positions % E, E)


def test_statistics_of_an_expert_are_those_of_its_tokens() -> None:
    """Its 4 tokens fill 8 slots, so each counts twice; the gradients agree, too."""
    experts = [Normed(nnx.Rngs(i)) for i in range(E)]
    copies = [nnx.clone(expert) for expert in experts]
    rows, target = (jnp.float32(RNG.normal(size=(4 * E, D))) for _ in range(2))
    one = TokenChoice(k=1, noise_std=0.0, normalize_weights=True)
    layer = MoE(experts, ByPosition(), replace(one, capacity=8))

    @nnx.jit
    def ours(layer: MoE, rows: jax.Array) -> Any:
        return nnx.grad(lambda layer, x: (layer(x) * target).sum(), argnums=(0, 1))(layer, rows)

    @nnx.jit
    def theirs(module: Normed, x: jax.Array, own: jax.Array) -> Any:
        return nnx.grad(lambda m, x: (m(x) * own).sum(), argnums=(0, 1))(module, x)

    by_layer, by_rows = ours(layer, rows)
    for i, module in enumerate(copies):
        kernel, tokens = theirs(module, rows[i::E], target[i::E])
        stacked = layer.experts.stacked
        np.testing.assert_allclose(stacked.norm.mean[i], module.norm.mean[...], atol=1e-5)
        np.testing.assert_allclose(stacked.norm.var[i], module.norm.var[...], rtol=1e-4)
        np.testing.assert_allclose(by_rows[i::E], tokens, rtol=1e-3, atol=1e-4)
        own = by_layer["experts"]["stacked"]["linear"]["kernel"][i]
        np.testing.assert_allclose(own, kernel["linear"]["kernel"][...], rtol=1e-3, atol=1e-4)


def test_padding_does_not_count_in_the_statistics_of_gates_and_shared_experts() -> None:
    """Half of the tokens are real, so each counts twice."""
    mask = np.zeros(24, bool)
    mask[RNG.permutation(24)[:12]] = True
    shared, choose = Normed(nnx.Rngs(5)), Normed(nnx.Rngs(6), E)
    copies = nnx.clone(shared), nnx.clone(choose)
    layer = MoE(linears(), choose, ROOMY, shared=shared)
    forward(layer, jnp.asarray(PADDED), mask=jnp.asarray(mask.reshape(4, 6)))
    for module in copies:
        nnx.jit(lambda m, x: m(x))(module, PADDED.reshape(24, D)[mask])
    of_shared, of_gate = (module.norm.mean[...] for module in copies)
    np.testing.assert_allclose(layer.shared.stacked.norm.mean[0], of_shared, atol=1e-5)
    np.testing.assert_allclose(layer.gate.norm.mean[...], of_gate, atol=1e-5)


class Unit(nnx.Module):
    """Finite neither at zero nor at equal numbers."""

    def __init__(self, rngs: nnx.Rngs, x: int = D):
        self.linear = nnx.Linear(D, x, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        centered = x - x.mean(-1, keepdims=True)
        return self.linear(centered / jnp.linalg.norm(centered, axis=-1, keepdims=True))


class Slotted(nnx.Module):
    """A gate of soft slots, that is not finite at zero."""

    def __init__(self) -> None:
        self.unit = Unit(nnx.Rngs(8), E * 2)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.unit(x).reshape(*x.shape[:-1], E, 2)


class UnitLinear(nnx.Linear):
    """A gate of the directions of tokens, which is not finite at zero."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x / jnp.linalg.norm(x, axis=-1, keepdims=True))


@pytest.mark.parametrize(
    "place", ["experts", "shared", "gate", "gate of mlps", "soft", "soft gate"]
)
@pytest.mark.parametrize("mask", [MASK, MASK & False], ids=["some", "all"])
def test_modules_that_are_not_finite_at_padding_have_finite_gradients(
    place: str, mask: np.ndarray
) -> None:
    units = [Unit(nnx.Rngs(i)) for i in range(E)]
    quiet, soft = replace(QUIET, images_per_group=2), Soft(capacity=2)
    slots = nnx.Linear(D, E * 2, rngs=nnx.Rngs(8))
    layer = {
        "experts": lambda: MoE(units, gate(), quiet),
        "shared": lambda: MoE(linears(), gate(), quiet, shared=units[0]),
        "gate of mlps": lambda: MoE(
            StackedMlps(E, D, 5, rngs=nnx.Rngs(1)),
            UnitLinear(D, E, use_bias=False, rngs=nnx.Rngs(8)),
            quiet,
        ),
        "gate": lambda: MoE(linears(), Unit(nnx.Rngs(8), E), quiet),
        "soft": lambda: MoE(
            units, nnx.Sequential(slots, lambda x: x.reshape(*x.shape[:-1], E, 2)), soft
        ),
        "soft gate": lambda: MoE(linears(), Slotted(), soft),
    }[place]()
    tokens = jnp.where(mask[..., None], PADDED, 0.0)

    @nnx.jit
    def gradients(layer: MoE, tokens: jax.Array) -> Any:
        def loss(layer: MoE, tokens: jax.Array) -> Any:
            outputs, record = layer.forward(tokens, mask=jnp.asarray(mask))
            return (outputs**2).sum() + record.aux_loss, outputs

        return nnx.grad(loss, argnums=(0, 1), has_aux=True)(layer, tokens)

    (of_layer, of_tokens), outputs = gradients(layer, tokens)
    for x in jax.tree.leaves((of_layer, of_tokens, outputs)):
        assert np.isfinite(x).all()
    assert not np.asarray(of_tokens)[~mask].any() and not np.asarray(outputs)[~mask].any()


def test_the_inputs_in_an_empty_slot_are_those_of_the_token_there() -> None:
    class Checked(nnx.Module):
        takes = ("filled", "images", "positions")

        def __call__(self, tokens: jax.Array, *, same: jax.Array, **slots: jax.Array) -> jax.Array:
            apart = jnp.abs(tokens - same).max(-1)  # also where a slot is empty
            wrong = (tokens[..., 0] != slots["images"]) | (tokens[..., 1] != slots["positions"])
            return jnp.where((apart.max() > 0) | wrong.any(), jnp.nan, tokens)

    tokens = np.float32(RNG.normal(size=(4, 6, D)))
    tokens[..., 0], tokens[..., 1] = np.arange(4)[:, None], np.arange(6)
    layer = MoE([Checked() for _ in range(E)], gate(), replace(QUIET, capacity=20))
    outputs, record = forward(layer, jnp.asarray(tokens), per_token={"same": jnp.asarray(tokens)})
    assert (record.routing.tokens == 24).any() and np.isfinite(outputs).all()
    halves = MoE([Checked() for _ in range(E)], gate(), QUIET, group=3)  # cut
    one = tokens[0] * (np.arange(D) > 0)
    outputs, record = forward(halves, jnp.asarray(one), per_token={"same": jnp.asarray(one)})
    assert record.valid.shape == (2, 3) and np.isfinite(outputs).all()


def test_the_jitter_and_the_noise_of_a_sequence_do_not_depend_on_its_shape() -> None:
    key = jax.random.key(0)
    for router in (Switch(jitter=0.2), TokenChoice()):
        layer = MoE(linears(), gate(), router)
        rows, images = (
            forward(layer, jnp.asarray(PADDED.reshape(*shape, D)), key=key)
            for shape in ((24,), (4, 6))
        )
        np.testing.assert_allclose(rows[0], images[0].reshape(24, D), rtol=1e-5, atol=1e-6)


def test_a_group_is_a_number_of_tokens_and_none_of_a_soft_router() -> None:
    for router, group, message in (
        (None, 0, "group=0: use a number of at least 1 token"),
        (Soft(), 9, "group=9: a soft router"),
    ):
        with pytest.raises(UsageError, match=message):
            MoE(linears(), gate(), router, group=group)


def test_a_batch_without_tokens_has_outputs_without_tokens() -> None:
    layer = MoE([Unit(nnx.Rngs(i)) for i in range(E)], gate())
    for shape in ((0, D), (0, 5, D), (3, 0, D)):
        for mask in (None, jnp.ones(shape[:-1], bool)):
            assert forward(layer, jnp.ones(shape), mask=mask)[0].shape == shape
