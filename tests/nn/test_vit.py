"""The whole model: its options, shapes and initialization."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx

import vmoe
from tests.random_models import PARTS
from vmoe import models
from vmoe.analysis import capture, capture_features
from vmoe.axes import Record
from vmoe.checkpoints.flax_names import published_name
from vmoe.config import (
    AttentionExpert,
    CenteredRotary,
    CnnExpert,
    ExpertChoice,
    GridRotary,
    MlpExpert,
    MoEConfig,
    Soft,
    TokenChoice,
    ViTConfig,
)
from vmoe.costs import flops
from vmoe.errors import UsageError
from vmoe.nn.attention import Attention
from vmoe.nn.moe import MoE
from vmoe.nn.vit import ViT
from vmoe.trees import by_name

ONE_IMAGE = dict(num_experts=4)
TWO_BLOCKS = dict(depth=2, sparse_blocks=(1,))
TIGHT = dict(
    router=dict(priority="largest_gate", noise_std=0.0, capacity_factor=0.5),
    experts=dict(shared_init=False),
)
DROPOUT = dict(dropout=0.1, moe=TIGHT | dict(experts=dict(dropout=0.1)))
VARIANTS: dict[str, dict[str, Any]] = {
    "dense": dict(sparse_blocks=()),
    "dense_mean_without_positions": dict(
        sparse_blocks=(), pooling="mean", positions="none", pre_logits=12, head_bias=-3.0
    ),
    "later": dict(**PARTS, sparse_blocks=(1,), depth=2),
    "attention_and_qk_norm": dict(pooling="attention", qk_norm=True),
    "sincos2d_in_bfloat16": dict(positions="sincos2d", dtype="bfloat16"),
    "dropout": DROPOUT,
    "expert_choice": dict(moe=MoEConfig(router=ExpertChoice(), **ONE_IMAGE)),
    "soft": dict(moe=MoEConfig(router=Soft(), **ONE_IMAGE)),
    "config_per_block": dict(
        depth=2,
        sparse_blocks=(0, 1),
        moe=(MoEConfig(num_experts=2, router=TokenChoice(k=1)), MoEConfig(num_experts=4)),
    ),
}


def tiny_config(**overrides: Any) -> ViTConfig:
    """The config of the tiny model with one sparse block, and a head whose logits are not zero."""
    fields = dict(depth=1, sparse_blocks=(0,), head_std=0.1)
    return models.model_config("vmoe_test_last2_e4", **fields | overrides)


def tiny(seed: int = 0, **overrides: Any) -> ViT:
    return models.build(tiny_config(**overrides), seed=seed)


@functools.partial(jax.jit, static_argnames=("graph", "train"))
def _run(graph, state, images, key, train):
    return capture(nnx.merge(graph, state, copy=True), images, train=train, key=key)


def run(
    model: ViT, images: np.ndarray, train: bool = False, key: int = 0
) -> tuple[jax.Array, dict[int, Record]]:
    return _run(*nnx.split(model), images, jax.random.key(key), train)


def images(b: int = 4, h: int = 32, w: int = 32) -> np.ndarray:
    return np.random.default_rng(b).uniform(-1, 1, (b, h, w, 3)).astype(np.float32)


def training_pass(model: ViT) -> tuple[Any, nnx.State]:
    """A function that returns ((loss, (logits, records)), gradients), and its argument."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params: nnx.State) -> Any:
        model = nnx.merge(graph, params, rest, copy=True)
        logits, records = capture(model, images(), train=True, key=jax.random.key(0))
        aux_loss = sum(record.aux_loss for record in records.values())
        return (logits**2).sum() + aux_loss, (logits, records)

    return jax.jit(jax.value_and_grad(loss, has_aux=True)), params


@functools.cache
def value_and_gradients(config: ViTConfig) -> Any:
    """The results of a training pass of the model of a config; tests share them."""
    run, params = training_pass(models.build(config))
    return run(params)


@pytest.mark.long_after(2)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_variant_gives_logits_records_and_gradients(variant: dict[str, Any]) -> None:
    config = tiny_config(**variant)
    (_, (logits, records)), gradients = value_and_gradients(config)
    assert logits.shape == (4, 10) and logits.dtype == jnp.float32
    assert tuple(records) == config.sparse_blocks
    assert np.isfinite(logits).all() and (np.std(logits, axis=0) > 0).all()
    for path, gradient in nnx.to_flat_state(gradients):
        values = np.float32(gradient[...])
        assert np.isfinite(values).all(), path
        assert values.any() or path[-2:] in {("key", "bias")}, path


def test_a_batch_without_images_has_no_logits() -> None:
    logits, records = run(tiny(), images(0))
    assert logits.shape == (0, 10) and not any(r.valid.any() for r in records.values())


def test_with_capacity_for_every_token_a_batch_equals_its_single_images() -> None:
    model = tiny(moe=dict(router=dict(capacity_factor=4.0)))  # with capacity for every token
    batched, _ = run(model, images(13))
    alone = np.concatenate([run(model, image[None])[0] for image in images(13)])
    np.testing.assert_allclose(batched, alone, atol=1e-5)


SIZES = [(64, 64), (16, 40)]


@pytest.mark.parametrize("positions", ["learned", "sincos2d", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_any_image_size_that_the_patch_size_divides_is_accepted(
    positions: str, size: tuple[int, int]
) -> None:
    logits, _ = run(tiny(positions=positions, sparse_blocks=()), images(2, *size))
    assert logits.shape == (2, 10) and jnp.isfinite(logits).all()


def rotated(
    heads: np.ndarray, rotary: CenteredRotary | GridRotary, grid: tuple[int, int], before: int
) -> np.ndarray:
    """Queries or keys (b n a z), rotated patch by patch and pair by pair."""
    result, z, centered = heads.copy(), heads.shape[-1], isinstance(rotary, CenteredRotary)
    for place in np.ndindex(*grid):
        n = before + place[0] * grid[1] + place[1]
        for pair in range(z // 2):
            axis, k = divmod(pair, z // 4)
            at, of = place[axis], grid[axis]
            c = 2 * np.pi * ((2 * at + 1) / of - 1) if centered else at * rotary.side / of
            angle = c / rotary.base ** (4 * k / z)
            first, second = (pair, pair + z // 2) if centered else (2 * pair, 2 * pair + 1)
            x, y = heads[:, n, :, first], heads[:, n, :, second]
            result[:, n, :, first] = x * np.cos(angle) - y * np.sin(angle)
            result[:, n, :, second] = x * np.sin(angle) + y * np.cos(angle)
    return result


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 32), *SIZES])
@pytest.mark.parametrize("rotary", [CenteredRotary(base=50.0), GridRotary(base=9.0, side=3)])
def test_attention_at_any_image_size_is_of_queries_and_keys_rotated_one_by_one(
    rotary: CenteredRotary | GridRotary, size: tuple[int, int]
) -> None:
    model, name = tiny(sparse_blocks=(), registers=1, rotary=rotary), "blocks.0.attention.weights"
    found = capture_features(model, images(2, *size), [name]).features[name]
    block, grid = model.blocks[0], (size[0] // 8, size[1] // 8)
    tokens = block.norm1(model.embed(images(2, *size)))
    query, key = (
        rotated(np.float64(layer(tokens)), rotary, grid, 2)
        for layer in (block.attention.query, block.attention.key)
    )
    logits = np.einsum("bqaz,bnaz->baqn", query, key) / np.sqrt(query.shape[-1])
    np.testing.assert_allclose(found, scipy.special.softmax(logits, axis=-1), atol=1e-5)


@pytest.mark.parametrize("size", SIZES)
def test_the_tokens_of_an_image_of_any_size_are_routed(size: tuple[int, int]) -> None:
    logits, records = jax.eval_shape(tiny().forward, images(2, *size))
    assert logits.shape == (2, 10)
    assert records[0].gates.shape[1] == 2 * (size[0] // 8 * size[1] // 8 + 1)


def test_an_image_size_that_the_patch_size_does_not_divide_is_refused() -> None:
    with pytest.raises(UsageError, match="images of 32 x 30 pixels: patches of 8"):
        tiny()(images(1, 32, 30))


def test_evaluation_is_deterministic_and_training_depends_on_its_key() -> None:
    model = tiny(dropout=0.1, attention_dropout=0.1, moe=dict(experts=dict(dropout=0.1)))
    np.testing.assert_array_equal(run(model, images())[0], run(model, images(), key=1)[0])
    one, same, other = (run(model, images(), train=True, key=key)[0] for key in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert (one != other).any()


WITHOUT_NOISE = dict(router=dict(noise_std=0.0))


@pytest.mark.parametrize(
    "overrides",
    [
        dict(dropout=0.5, sparse_blocks=()),
        dict(attention_dropout=0.5, sparse_blocks=()),
        dict(moe=dict(experts=dict(dropout=0.5)) | WITHOUT_NOISE),
        dict(),
        dict(moe=WITHOUT_NOISE),
    ],
    ids=["dropout", "attention_dropout", "expert_dropout", "noise", "nothing"],
)
def test_each_source_of_randomness_changes_training_by_itself(overrides: dict[str, Any]) -> None:
    model = tiny(**overrides)
    one, other = (run(model, images(), train=True, key=key)[0] for key in (1, 2))
    assert (one == other).all() == (overrides == dict(moe=WITHOUT_NOISE))


def test_attention_dropout_differs_between_images() -> None:
    model = tiny(attention_dropout=0.5, sparse_blocks=())
    logits, _ = run(model, np.repeat(images(1), 4, axis=0), train=True)
    assert (logits[0] != logits[1]).any()


@pytest.mark.parametrize("rotary", [None, GridRotary()])
def test_the_random_draws_of_attention_are_flaxs_with_rotary_positions_as_well(
    rotary: GridRotary | None,
) -> None:
    attention = Attention(
        8, 2, dropout=0.5, qk_norm=True, rotary=rotary, dtype=None, rngs=nnx.Rngs(0)
    )
    tokens, key = jax.random.normal(jax.random.key(0), (3, 5, 8)), jax.random.key(1)
    expected = nnx.MultiHeadAttention.__call__(
        attention, tokens, rngs=nnx.Rngs(dropout=key), deterministic=False, decode=False
    )
    rotation = jnp.stack([jnp.ones((5, 1, 4)), jnp.zeros((5, 1, 4))])  # of angle 0
    np.testing.assert_allclose(
        attention(tokens, key=key, rotation=rotation), expected, rtol=1e-5, atol=1e-6
    )


def test_training_without_a_key_uses_the_next_key_of_the_models_rng_stream() -> None:
    one, same = (tiny(seed=3, dropout=0.5, sparse_blocks=()) for _ in range(2))
    call = nnx.jit(lambda model: model(images(), train=True))
    first = call(one)
    np.testing.assert_array_equal(first, call(same))
    assert (first != call(one)).any()


@pytest.mark.slow
def test_rematerialization_changes_neither_outputs_nor_gradients() -> None:
    """The block is reduced and drops choices."""
    plain, remat = (
        value_and_gradients(tiny_config(remat=remat, **DROPOUT)) for remat in (False, True)
    )
    assert plain[0][1][1][0].routing.dropped.any()
    program = jax.make_jaxpr(tiny(remat=True, sparse_blocks=()).__call__)(images())
    assert "remat" in str(program) or "checkpoint" in str(program)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), plain, remat)


LAST: dict[str, dict[str, Any]] = {
    "dense": dict(sparse_blocks=(), registers=2, rotary=CenteredRotary()),
    **{
        x: dict(moe=TIGHT | dict(experts=dict(implementation=x)))
        for x in ("auto", "batched", "ragged")
    },
    "dropless": dict(moe=dict(router=dict(dropless=True), experts=dict(shared_init=False))),
    "expert_choice": VARIANTS["expert_choice"],
    "soft": VARIANTS["soft"],
}


@pytest.mark.long_after(2)
@pytest.mark.parametrize("last", LAST)
def test_a_reduced_last_block_changes_no_logit_loss_or_gradient(last: str) -> None:
    """The oracle is the full block, one for all implementations."""
    drops = last in ("auto", "batched", "ragged")
    reduced = value_and_gradients(tiny_config(**LAST[last]))
    fields = LAST["auto" if drops else last]
    full = value_and_gradients(tiny_config(full_last_block=True, **fields))
    assert not drops or full[0][1][1][0].routing.dropped.any()
    # rtol, because on some machines rounding moves gradients of 40 by more than 2e-5
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-5)
    jax.tree.map(close, reduced, full)


@pytest.mark.parametrize("sparse_blocks", [(0,), ()])
@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_where_all_tokens_are_pooled_the_last_block_is_never_reduced(
    pooling: str, sparse_blocks: tuple[int, ...]
) -> None:
    fields = dict(pooling=pooling, sparse_blocks=sparse_blocks)
    reduced, full = (
        jax.jit(tiny(full_last_block=full, **fields).forward).lower(images()).as_text()
        for full in (False, True)
    )
    assert reduced == full


def test_logits_do_not_depend_on_whether_the_records_are_used() -> None:
    model = tiny(**LAST["auto"])
    logits, with_records = jax.jit(lambda x: (model(x), capture(model, x)[0]))(images())
    np.testing.assert_allclose(logits, with_records, atol=1e-6)


def test_the_last_block_computes_less_where_only_a_class_token_is_read() -> None:
    for fields in (LAST["dense"], {}):
        config = tiny_config(**TWO_BLOCKS | fields)
        assert flops.flops_to_logits(config) < 0.85 * flops.cost(config).flops_per_image
    pooled = tiny_config(pooling="mean")
    assert flops.flops_to_logits(pooled) == flops.cost(pooled).flops_per_image


@pytest.mark.parametrize("implementation", ["batched", "blocked", "ragged"])
def test_bfloat16_experts_multiply_in_bfloat16_and_accumulate_in_float32(
    implementation: str,
) -> None:
    """Reads all matrix products of the hidden layer in the program lowered for a GPU."""
    config = MoEConfig(num_experts=5, experts=MlpExpert(implementation=implementation))
    graph, state = nnx.split(MoE.from_config(config, 16, 48, 8, rngs=nnx.Rngs(0)))

    def loss(state: nnx.State, tokens: jax.Array) -> jax.Array:
        return nnx.merge(graph, state)(tokens).sum()

    tokens = jnp.ones((2, 8, 16), jnp.bfloat16)
    traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(state, tokens)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    products = re.findall(r"dot(?:_general)?\W.*: \((.*)\) -> tensor<(.*)>", program)
    products = [(terms, out) for terms, out in products if re.search("[<x]48x", terms + out)]
    assert len(products) >= 6
    for terms, out in products:
        assert terms.count("bf16") == 2 and out.endswith("xf32"), (terms, out)


@pytest.mark.parametrize("experts", [CnnExpert(), AttentionExpert()], ids=lambda x: x.kind)
def test_experts_that_mix_tokens_compute_in_the_dtype_of_the_model(
    experts: CnnExpert | AttentionExpert,
) -> None:
    """Reads all products of a layer; the first is the gate's."""
    config = tiny_config(dtype="bfloat16", pooling="mean", moe=dict(experts=experts))
    graph, state = nnx.split(models.build_abstract(config).blocks[0].mlp)
    tokens = jax.ShapeDtypeStruct((2, 16, config.width), jnp.bfloat16)
    layer = jax.jit(lambda state, tokens: nnx.merge(graph, state)(tokens)).lower(state, tokens)
    assert layer.out_info.dtype == jnp.bfloat16
    gate, *products = re.findall(r"(?:dot_general|convolution)\W.*: \((.*)\) -> ", layer.as_text())
    assert "bf16" not in gate and len(products) >= 2
    for terms in products:
        assert terms.count("bf16") == 2, terms


@functools.cache
def gradients_of_a_layer(implementation: str, dtype: str) -> list[jax.Array]:
    """For tokens that are bfloat16 numbers, so that the choices are the same in both dtypes."""
    config = MoEConfig(
        num_experts=4, experts=MlpExpert(implementation=implementation, shared_init=False)
    )
    graph, state = nnx.split(MoE.from_config(config, 16, 32, 9, rngs=nnx.Rngs(0)))
    tokens = jax.random.normal(jax.random.key(0), (4, 9, 16)).astype(jnp.bfloat16).astype(dtype)

    def loss(state: nnx.State) -> jax.Array:
        outputs = nnx.merge(graph, state)(tokens)
        assert outputs.dtype == dtype
        return (outputs**2).sum()

    return jax.tree.leaves(jax.jit(jax.grad(loss))(state))


@pytest.mark.parametrize("implementation", ["batched", "blocked", "ragged"])
def test_gradients_of_bfloat16_layers_are_close_to_those_of_float32(implementation: str) -> None:
    """One oracle for all implementations, whose gradients in float32 are equal."""
    rough = gradients_of_a_layer(implementation, "bfloat16")
    for x, y in zip(rough, gradients_of_a_layer("batched", "float32"), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, y, atol=0.03 * np.abs(y).max())


def test_blocked_experts_use_the_same_dropout_mask_forward_and_backward() -> None:
    """The oracle is a finite difference along the sign of the gradient."""
    config = MoEConfig(num_experts=2, experts=MlpExpert(dropout=0.5, implementation="blocked"))
    moe = MoE.from_config(config, 16, 32, 8, rngs=nnx.Rngs(0))
    graph, state = nnx.split(moe)
    tokens, key = jax.random.normal(jax.random.key(0), (2, 8, 16)), jax.random.key(1)

    @jax.jit
    @jax.value_and_grad
    def loss(state: nnx.State) -> jax.Array:
        return nnx.merge(graph, state)(tokens, key=key).sum()

    _, gradient = loss(state)
    up, down = (
        loss(jax.tree.map(lambda x, y, s=step: np.add(x, s * np.sign(y)), state, gradient))[0]
        for step in (1e-3, -1e-3)
    )
    expected = sum(np.abs(x).sum() for x in jax.tree.leaves(gradient)) * 2e-3
    assert float(up - down) == pytest.approx(float(expected), rel=2e-2)


def test_bfloat16_logits_are_close_to_float32_and_routers_and_parameters_stay_float32() -> None:
    exact, rough = tiny(**TWO_BLOCKS), tiny(**TWO_BLOCKS, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(nnx.state(rough, nnx.Param))} == {"float32"}
    logits, records = run(rough, images())
    assert records[1].logits.dtype == records[1].routing.weights.dtype == jnp.float32
    np.testing.assert_allclose(logits, run(exact, images())[0], atol=0.05)


def test_reduced_precision_transfer_rounds_rows_and_nothing_else() -> None:
    exact = tiny(moe=dict(router=dict(capacity_factor=4.0)))
    rounded = tiny(moe=dict(exchange=dict(dtype="bfloat16"), router=dict(capacity_factor=4.0)))
    tokens = jax.random.normal(jax.random.key(0), (2, 17, 16))
    moe, rounded_moe = exact.blocks[0].mlp, rounded.blocks[0].mlp

    @jax.jit
    def run(tokens: jax.Array) -> tuple[jax.Array, Record, jax.Array]:
        """The layer's output, and every expert's output for rounded tokens, rounded again."""
        rounded_tokens = tokens.reshape(1, -1, 16).astype(jnp.bfloat16).astype(jnp.float32)
        rows = moe.experts(jnp.broadcast_to(rounded_tokens[:, None], (1, 4, 34, 16)))
        rows = rows.astype(jnp.bfloat16).astype(jnp.float32)
        return rounded_moe(tokens), moe.forward(tokens)[1], rows

    out, record, rows = jax.tree.map(np.asarray, run(tokens))
    experts, weights = record.routing.experts, record.routing.weights
    picked = rows[0][experts[0], np.arange(34)[:, None]]
    # the sum is in float32
    expected = (picked * weights[0][..., None]).sum(1).reshape(2, 17, 16)
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_initialization_has_the_published_distributions(pytestconfig: pytest.Config) -> None:
    """The stored arrays are one draw of the authors' code; ours have the same deviations."""
    folder = pytestconfig.rootpath / "tests" / "golden"
    stored = np.load(folder / "tiny_last2_k2_bpr_c0.5_indices.npz")
    model = vmoe.create_model("vmoe_test_last2_e4")
    for path, leaf in by_name(models.params_of(model)).items():
        ours, theirs = np.asarray(leaf), stored["init/" + published_name(path, model.config)]
        assert ours.shape == theirs.shape
        if theirs.std() == 0:  # constant: zeros, or ones of a norm's scale
            np.testing.assert_array_equal(ours, theirs, err_msg=str(path))
        else:
            error = 5 / np.sqrt(2 * theirs.size)  # five standard errors of a standard deviation
            assert ours.std() / theirs.std() == pytest.approx(1, abs=2**0.5 * error), path
            kurtosis = (scipy.stats.kurtosis(x, axis=None) for x in (ours, theirs))
            uniform = [k < -0.6 for k in kurtosis]  # a uniform has -1.2, a normal 0
            assert theirs.size < 200 or uniform[0] == uniform[1], path


def test_experts_start_equal_with_shared_init_and_different_without() -> None:
    shared = tiny().blocks[0].mlp.experts.up.kernel[...]
    own = tiny(moe=dict(experts=dict(shared_init=False))).blocks[0].mlp.experts.up.kernel[...]
    assert (shared == shared[:1]).all()
    assert (own[0] != own[1]).all()
    limit = np.sqrt(6 / (16 + 32))  # Xavier-uniform with the fans of one expert
    for kernel in (shared, own):
        assert 0.9 * limit < np.abs(kernel).max() <= limit


def test_padding_images_change_no_other_logits() -> None:
    """Image 1 comes after one that pads its group; a second group is padding."""
    model = tiny(moe=dict(router=dict(capacity_factor=0.5)))
    valid = np.array([False, True, False, False])
    image, others = images(4)[1:2], 5 * images(4)[[0, 2, 3]]
    forward = jax.jit(model.__call__)
    padded = forward(np.concatenate([others[:1], image, others[1:]]), valid=valid)[1]
    alike = forward(np.tile(image, (4, 1, 1, 1)), valid=valid)[1]
    np.testing.assert_allclose(padded, alike, atol=1e-6)


@pytest.mark.slow
def test_each_sparse_block_can_have_its_own_config() -> None:
    (_, (_, records)), _ = value_and_gradients(tiny_config(**VARIANTS["config_per_block"]))
    assert records[0].gates.shape[-1] == 2 and records[0].routing.slots.shape[-1] == 1
    assert records[1].gates.shape[-1] == 4 and records[1].routing.slots.shape[-1] == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=3), "model.num_heads=3 with model.width=16"),
        (dict(image_size=30), "model.patch_size=8 with model.image_size=30"),
        (dict(sparse_blocks=(4,)), "with model.depth=4: use ascending numbers"),
        (dict(sparse_blocks=(3, 1)), "use ascending numbers"),
        (dict(dropout=1.0), "model.dropout=1.0: use less than 1"),
        (dict(moe=dict(router=dict(k=5))), "moe.router.k=5 with model.moe.num_experts=4"),
        (dict(moe=(MoEConfig(),)), "one for each of the 2 sparse blocks"),
        (
            dict(moe=dict(router=Soft(), experts=dict(implementation="ragged"))),
            "moe.experts.implementation=ragged: a soft router fills every slot",
        ),
        (
            dict(width=18, num_heads=2, positions="sincos2d"),
            "model.width=18 with model.positions=sincos2d",
        ),
        (
            dict(width=12, num_heads=2, rotary=GridRotary()),
            "model.num_heads=2 with model.rotary.kind=grid: use heads of a width that is a "
            "multiple of 4",
        ),
        (
            dict(registers=1, moe=dict(experts=CnnExpert())),
            "model.registers=1 with model.moe.experts.kind=cnn: cnn experts need a grid of patches",
        ),
        (dict(dept=3), "ViTConfig has no field 'dept': did you mean 'depth'"),
        (
            dict(moe=dict(capacity=3)),
            r"MoEConfig has no field 'capacity': use router=dict\(capacity=...\)",
        ),
    ],
)
def test_invalid_settings_are_refused_by_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        models.model_config("vmoe_test_last2_e4", **fields)


def test_moe_of_returns_the_config_of_a_sparse_block() -> None:
    config = ViTConfig(
        sparse_blocks=(5, 7), moe=(MoEConfig(num_experts=2), MoEConfig(num_experts=3))
    )
    assert config.moe_of(4) is None
    assert [config.moe_of(i).num_experts for i in (5, 7)] == [2, 3]
