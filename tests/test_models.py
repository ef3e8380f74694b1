"""Names, parameter counts and FLOPs of the published models."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import vmoe
from tests.command import ROOT
from tests.random_models import PARTS
from vmoe import models
from vmoe.config import (
    BiasBalanced,
    CenteredRotary,
    CnnExpert,
    CosineGate,
    ExpertChoice,
    ExpertList,
    GatedMlpExpert,
    GoldenRotary,
    GridRotary,
    Hash,
    IdentityExpert,
    MlpExpert,
    MoEConfig,
    Soft,
    TokenChoice,
    ViTConfig,
    ZeroExpert,
    replace,
)
from vmoe.costs.flops import cost, count_flops, sparse_layer_flops
from vmoe.costs.summary import parameters_by_part, summarize
from vmoe.errors import UsageError
from vmoe.nn.vit import ViT
from vmoe.trees import by_name

MILLIONS = {  # 32 experts, 18,291 classes, 224 px (V-MoE, tables 7 and 8)
    "vit_s32": 36.5,
    "vmoe_s32_every2_e32": 296.9,
    "vit_b32": 102.1,
    "vmoe_b32_every2_e32": 980.6,
    "vit_b16": 100.5,
    "vmoe_b16_every2_e32": 979.0,
    "vmoe_l32_last2_e32": 845.8,
    "vit_l16": 323.1,
    "vmoe_l16_every2_e32": 3446.0,
    "vit_h14": 655.8,
    "vmoe_h14_last5_e32": 2688.6,
    "vmoe_h14_every2_e32": 7160.8,
}


def parameters(name: str, **overrides: object) -> int:
    return sum(parameters_by_part(models.model_config(name, **overrides)).values())


@pytest.mark.parametrize(("name", "millions"), MILLIONS.items())
def test_parameter_counts_equal_the_published_ones(name: str, millions: float) -> None:
    assert round(parameters(name, num_classes=18_291) / 1e6, 1) == millions


def test_the_15b_model_has_the_published_parameter_count() -> None:
    assert parameters("vmoe_15b_every2_e32", num_classes=29_593) == 14_705_071_769


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("vmoe_s32_last2_e8", {}, 56_999_400),
        ("vmoe_s32_last2_e8", dict(image_size=384, pre_logits=None), 56_785_384),
        ("vmoe_b16_every2_e8", dict(num_classes=21_843), 300_974_931),
        ("vmoe_b16_every2_e8", dict(image_size=384), 285_238_504),
    ],
)
def test_models_of_published_checkpoints_have_exactly_their_parameter_counts(
    name: str, overrides: dict[str, object], expected: int
) -> None:
    assert parameters(name, **overrides) == expected


@pytest.mark.parametrize(
    ("name", "millions"),  # timm's, with a head of 1,000 classes
    [
        ("vit_tiny_patch16_224", 5.717416),
        ("deit_small_patch16_224", 22.050664),
        ("vit_small_patch32_224", 22.878952),
        ("vit_base_patch32_224", 88.224232),
        ("vit_base_patch16_224", 86.567656),
        ("vit_large_patch16_224", 304.326632),
    ],
)
def test_names_of_timm_have_a_model_with_timms_parameter_count(name: str, millions: float) -> None:
    own = models.of_timm(name)
    assert own and parameters(own, pre_logits=None) == pytest.approx(millions * 1e6, abs=0.5)
    assert f"| `{name}` | `{own}` |" in (ROOT / "docs/from_timm.md").read_text()


GIANT = dict(width=1536, depth=40, num_heads=24, mlp_dim=4096, mlp="gated")
DINOV3 = dict(patch_size=16, positions="none", rotary=CenteredRotary(), registers=4)
EVA02 = dict(rotary=GridRotary(), image_size=224)
GATED_NORM = dict(mlp="gated_norm")
SMALL = dict(width=384, depth=12, num_heads=6, mlp_dim=1536)
BASE = dict(width=768, depth=12, num_heads=12, mlp_dim=3072)
LARGE = dict(width=1024, depth=24, num_heads=16, mlp_dim=4096)
SIGLIP = dict(patch_size=16, image_size=224, pooling="attention")
LATER: dict[str, tuple[int, dict[str, Any]]] = {  # parameters in timm 1.0.31, without a head
    "vit_small_patch14_dinov2": (22_056_192, SMALL),
    "vit_small_patch14_reg4_dinov2": (22_057_344, SMALL | dict(registers=4)),
    "vit_base_patch14_dinov2": (86_579_712, BASE),
    "vit_base_patch14_reg4_dinov2": (86_582_016, BASE | dict(registers=4)),
    "vit_large_patch14_dinov2": (304_367_616, LARGE),
    "vit_giant_patch14_dinov2": (1_136_479_232, GIANT),
    "vit_giant_patch14_reg4_dinov2": (1_136_483_840, GIANT | dict(registers=4)),
    "vit_small_patch16_dinov3": (21_586_944, SMALL | DINOV3),
    "vit_small_plus_patch16_dinov3": (28_683_264, SMALL | DINOV3 | dict(mlp="gated")),
    "vit_base_patch16_dinov3": (85_641_216, BASE | DINOV3),
    "vit_large_patch16_dinov3": (303_079_424, LARGE | DINOV3),
    "vit_huge_plus_patch16_dinov3": (
        840_509_440,
        dict(width=1280, depth=32, num_heads=20, mlp_dim=5120, mlp="gated") | DINOV3,
    ),
    "vit_7b_patch16_dinov3": (
        6_716_030_976,
        dict(width=4096, depth=40, num_heads=32, mlp_dim=8192, mlp="gated") | DINOV3,
    ),
    "eva02_tiny_patch14_224": (
        5_502_144,
        dict(width=192, depth=12, num_heads=3, mlp_dim=512, mlp="gated") | EVA02,
    ),
    "eva02_base_patch14_224": (85_758_720, BASE | EVA02 | GATED_NORM | dict(mlp_dim=2048)),
    "eva02_large_patch14_clip_224": (
        303_317_952,
        LARGE | EVA02 | GATED_NORM | dict(mlp_dim=2730, attention_norm=True),
    ),
    "vit_base_patch16_siglip_224": (92_884_224, BASE | SIGLIP),
    "vit_large_patch16_siglip_256": (315_956_224, LARGE | SIGLIP | dict(image_size=256)),
    "vit_so400m_patch14_siglip_224": (
        427_680_704,
        dict(width=1152, depth=27, num_heads=16, mlp_dim=4304) | SIGLIP | dict(patch_size=14),
    ),
    "vit_giantopt_patch16_siglip_256": (
        1_163_168_256,
        dict(width=1536, depth=40, num_heads=16, mlp_dim=6144) | SIGLIP | dict(image_size=256),
    ),
    "eva02_small_patch14_224": (21_621_120, SMALL | EVA02 | dict(mlp_dim=1024, mlp="gated")),
    "eva02_large_patch14_224": (
        303_268_800,
        dict(width=1024, depth=24, num_heads=16, mlp_dim=2730) | EVA02 | GATED_NORM,
    ),
    "eva02_base_patch16_clip_224": (
        85_869_312,
        dict(width=768, depth=12, num_heads=12, mlp_dim=2048, patch_size=16, attention_norm=True)
        | EVA02
        | GATED_NORM,
    ),
}


@pytest.mark.parametrize("name", LATER)
def test_models_of_later_families_have_the_parameter_counts_of_timm(name: str) -> None:
    """Layer scale is folded here, and biases that timm leaves out are zeros.

    With registers timm has no position for the class token. The counts are of timm 1.0.31.
    """
    expected, fields = LATER[name]
    config = ViTConfig(**dict(patch_size=14, image_size=518 if "14" in name else 224) | fields)
    config = replace(config, num_classes=0)
    if "dino" in name:
        expected -= 2 * config.depth * config.width
    if "reg4" in name:
        expected += config.width
    left_out = 3 if "dinov3" in name else "eva02" in name
    expected += left_out * config.depth * config.width
    assert sum(parameters_by_part(config).values()) == expected


SIGLINO = dict(patch_size=16, positions="none", rotary=GoldenRotary(), registers=4, norm="rms")
SIGLINO |= dict(depth=18, num_classes=0, attention_sink=True, qk_rms=True)
SIGLINOS: dict[str, tuple[int, dict[str, Any]]] = {  # parameters, and fields
    "siglino-moe-0.3-0.6B": (
        503_539_344,
        dict(width=768, num_heads=8, head_dim=128, mlp_dim=384, sparse_blocks=tuple(range(18)))
        | dict(moe=MoEConfig(28, GatedMlpExpert(), router=BiasBalanced(k=6, dropless=True))),
    ),
    "siglino-0.6B": (472_896_288, dict(width=1280, num_heads=16, mlp_dim=5120, mlp="gated")),
}


@pytest.mark.parametrize("name", SIGLINOS)
def test_models_of_siglino_have_the_parameter_counts_of_its_own_code(name: str) -> None:
    """The heads for its teachers do not count, and neither do biases, which are zeros here."""
    expected, fields = SIGLINOS[name]
    sizes = models.abstract_params(ViTConfig(**SIGLINO | fields))
    learned = (math.prod(leaf.shape) for path, leaf in sizes.items() if not path.endswith("/bias"))
    assert sum(learned) == expected


def test_a_description_names_the_parts_that_v_moe_does_not_have() -> None:
    plain = "12 blocks, width 384, 6 heads, MLP 1536, patches of 16 px"
    small = replace(models.model_config("vit_b16"), **SMALL)
    assert small.description == plain
    assert replace(small, **DINOV3).description == (
        f"{plain}, 4 registers, rotary positions (centered)"
    )
    siglino = ViTConfig(**SIGLINO | SIGLINOS["siglino-0.6B"][1]).description
    assert "gated MLP 5120, " in siglino and siglino.endswith(
        "rotary positions (golden), RMSNorm, normalized queries and keys, attention sinks"
    )


@pytest.mark.parametrize("name", models.list_models())
def test_every_named_model_builds_abstractly_and_matches_its_name(name: str) -> None:
    config = models.model_config(name)
    assert bool(config.sparse_blocks) == name.startswith("vmoe")
    by_data = name.endswith(("fashion_mnist", "emoji"))
    assert str(config.patch_size) in name or "test" in name or "15b" in name or by_data
    if config.sparse_blocks and not by_data:
        assert name.endswith(f"_e{config.moe.num_experts}")
        last = name.partition("_last")[2].partition("_")[0]
        if last:
            assert len(config.sparse_blocks) == int(last)
        assert config.sparse_blocks[-1] == config.depth - 1


def test_abstract_parameters_are_those_of_the_model_by_path() -> None:
    """The oracle is the model; blocks 1 and 2 are equal, 0 and 3 differ from all others."""
    moe = (*(MoEConfig(num_experts=2),) * 2, MoEConfig(num_experts=3))
    config = models.model_config("vmoe_test_last2_e4", sparse_blocks=(1, 2, 3), moe=moe)
    expected = by_name(models.params_of(models.build_abstract(config)))
    assert models.abstract_params(config) == expected


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UsageError, match="did you mean 'vmoe_s32_last2_e8'"):
        vmoe.create_model("vmoe_s32_last2_e9")


def test_the_head_bias_of_the_published_s32_suits_the_number_of_classes() -> None:
    """The bias is -log(classes), where the sigmoid loss starts; without a head there is none."""
    config = models.model_config("vmoe_s32_last2_e8", num_classes=10)
    assert config.head_bias == pytest.approx(-math.log(10))
    model = models.build_abstract(models.model_config("vmoe_s32_last2_e8", num_classes=0))
    assert model.config.num_classes == 0 and model.head.classes is None


def test_flops_of_a_dense_model_equal_a_count_by_hand() -> None:
    """A dense block on n tokens: 8 n d^2 for the projections, 4 n^2 d, and 4 n d f."""
    config = models.model_config("vit_test")
    n, d, f, depth = 17, 16, 32, 4
    block = 8 * n * d * d + 4 * n * n * d + 4 * n * d * f
    by_hand = 2 * 16 * (8 * 8 * 3) * d + depth * block + 2 * d * 10
    assert cost(config).flops_per_image == by_hand


def test_flops_and_parameters_of_a_later_vit_equal_a_count_by_hand() -> None:
    """Heads of width z, a sink as one more token, gated MLPs, RMSNorms and their scales."""
    config = models.model_config("vit_test", **PARTS)
    n, d, f, depth, heads, registers = 20, 16, 32, 4, 2, 3
    az = heads * 12
    attention = 8 * n * d * az + 4 * n * (n + 1) * az
    by_hand = 2 * 16 * (8 * 8 * 3) * d + depth * (attention + 6 * n * d * f) + 2 * d * 10
    assert cost(config).flops_per_image == by_hand and cost(config).tokens_per_image == n
    attention = 4 * d * az + 3 * az + d + az + heads  # kernels, biases, the norm, the sinks
    mlp = 3 * d * f + 2 * f + d + f  # the last is the norm's
    ends = (8 * 8 * 3 + 1) * d + d + registers * d + 17 * d + d + 10 * (d + 1)
    parts = parameters_by_part(config)
    assert (
        sum(parts.values()) == cost(config).parameters == depth * (attention + mlp + 2 * d) + ends
    )
    assert parts["registers"] == registers * d


def test_flops_of_a_sparse_block_are_those_of_its_slots_and_its_gate() -> None:
    dense, sparse = (cost(models.model_config(x)) for x in ("vit_test", "vmoe_test_last2_e4"))
    # 34 tokens of 2 images: ceil(34 * 2 * 1.05 / 4) = 18 slots, to a multiple of four 20.
    n, d, f, e, slots = 17, 16, 32, 4, 20
    extra = 2 * (4 * e * slots / 2 * d * f - 4 * n * d * f + 2 * n * d * e)
    assert sparse.flops_per_image - dense.flops_per_image == extra


@pytest.mark.parametrize(
    ("implementation", "dropless", "rows"),
    [
        ("auto", False, 4 * 20),  # slots, for the 34 tokens of two images
        ("blocked", False, 34 * 2),
        ("ragged", False, 34 * 2),
        ("auto", True, 34 * 2),
        ("batched", True, 4 * 34),
    ],
)
def test_flops_of_experts_are_those_of_all_slots_or_of_the_rows_that_can_fill_them(
    implementation: str, dropless: bool, rows: int
) -> None:
    experts = MlpExpert(implementation=implementation)
    router = TokenChoice(dropless=dropless, images_per_group=2)
    config = models.model_config("vmoe_test_last2_e4", moe=MoEConfig(4, experts, router=router))
    n, d, f, e = 17, 16, 32, 4
    extra = 2 * (4 * rows / 2 * d * f - 4 * n * d * f + 2 * n * d * e)
    dense = cost(models.model_config("vit_test")).flops_per_image
    assert cost(config).flops_per_image - dense == extra
    layer = sparse_layer_flops(config, config.moe, class_token_only=False)
    assert layer == 4 * rows / 2 * d * f + 2 * n * d * e


def test_active_parameters_are_those_that_a_token_uses() -> None:
    def active(**moe: object) -> float:
        return cost(models.model_config("vmoe_test_last2_e4", moe=MoEConfig(**moe)))

    dense = cost(models.model_config("vit_test")).parameters
    expert = 2 * 16 * 32 + 32 + 16
    gate = 16 * 4
    two = active(num_experts=4, router=TokenChoice(images_per_group=2))
    assert two.parameters == dense + 2 * (3 * expert + gate)
    assert two.active_parameters == dense + 2 * (expert + gate)
    router = ExpertChoice(capacity_factor=1.0, images_per_group=1)
    chosen = active(num_experts=4, router=router)
    slots = 4 * 8 / 17  # for 17 tokens: 5 slots, to a multiple of four 8
    assert chosen.active_parameters == pytest.approx(dense + 2 * ((slots - 1) * expert + gate))
    soft = active(num_experts=4, router=Soft())
    assert soft.active_parameters < soft.parameters


def test_experts_of_different_kinds_count_with_their_mean_and_with_their_convolutions() -> None:
    """Blocks 1 and 3 have an MLP, a CNN, an identity and a zero expert."""
    each = (MlpExpert(), CnnExpert(), IdentityExpert(), ZeroExpert())
    moe = replace(
        MoEConfig(
            num_experts=4, experts=ExpertList(each=each), router=TokenChoice(images_per_group=2)
        ),
        router=dict(k=1),
    )
    dense = cost(models.model_config("vit_test"))
    sparse = cost(models.model_config("vmoe_test_last2_e4", moe=moe))
    n, d, f, e = 17, 16, 32, 4
    mlp, cnn, gate = 2 * d * f + f + d, 9 * d + d + d * d + d, d * e
    assert sparse.parameters == dense.parameters + 2 * (cnn + gate)
    active = dense.parameters - 2 * mlp + 2 * ((mlp + cnn) / 4 + gate)
    assert sparse.active_parameters == pytest.approx(active)
    slots = 12  # 34 tokens of 2 images: ceil(34 * 1.05 / 4) = 9, to a multiple of four 12
    convolved = 2 * 9 * d * n  # per image: all patches, and the class token alone
    per_image = slots / 2 * (4 * d * f + 2 * d * d) + convolved + 2 * n * d * e - 4 * n * d * f
    assert sparse.flops_per_image - dense.flops_per_image == 2 * per_image
    text = summarize(
        models.model_config("vmoe_test_last2_e4", moe=replace(moe, router=dict(dropless=True)))
    )
    assert "4 experts (mlp, cnn, identity, zero), token_choice, dropless" in text


def test_experts_without_parameters_cost_nothing_but_their_gate() -> None:
    dense = cost(models.model_config("vit_test"))
    moe = replace(
        MoEConfig(num_experts=4, router=TokenChoice(images_per_group=2)), experts=IdentityExpert()
    )
    skipping = cost(models.model_config("vmoe_test_last2_e4", moe=moe))
    mlp, gate = 2 * 16 * 32 + 32 + 16, 16 * 4
    assert skipping.parameters == skipping.active_parameters == dense.parameters - 2 * (mlp - gate)
    hashed = models.model_config("vmoe_test_last2_e4", moe=replace(moe, router=Hash()))
    assert cost(hashed).parameters == cost(hashed).active_parameters == dense.parameters - 2 * mlp
    assert "4 experts (identity), hash" in summarize(hashed)


def test_a_convolution_counts_the_taps_of_its_kernel() -> None:
    x = jnp.ones((2, 5, 5, 6))
    for groups, strides, size in ((1, 1, 5), (6, 1, 5), (3, 2, 3)):
        conv = nnx.Conv(
            6, 12, (3, 3), strides=strides, feature_group_count=groups, rngs=nnx.Rngs(0)
        )
        jaxpr = jax.make_jaxpr(lambda x, conv=conv: conv(x))(x).jaxpr
        assert count_flops(jaxpr) == 2 * (2 * size**2 * 12) * 9 * (6 // groups)
    stacked = jax.vmap(lambda k: conv_of(x, k))
    jaxpr = jax.make_jaxpr(stacked)(jnp.ones((7, 3, 3, 6, 4))).jaxpr
    assert count_flops(jaxpr) == 7 * 2 * (2 * 25 * 4) * 9 * 6
    # The backward pass of a convolution costs twice as much as the forward pass.
    gradient = jax.grad(lambda x, k: conv_of(x, k).sum(), argnums=(0, 1))
    jaxpr = jax.make_jaxpr(gradient)(x, jnp.ones((3, 3, 6, 4))).jaxpr
    assert count_flops(jaxpr) == 3 * 2 * (2 * 25 * 4) * 9 * 6
    # The zeros between the gradients of a convolution with strides do not count.
    strided = nnx.Conv(6, 12, (3, 3), strides=2, rngs=nnx.Rngs(0))
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: strided(x).sum()))(x).jaxpr
    assert count_flops(jaxpr) < 2 * (2 * (2 * 9 * 12) * 9 * 6)


def conv_of(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def test_flops_in_a_loop_count_once_per_iteration_and_unknown_lengths_are_refused() -> None:
    x = jnp.ones((4, 4))

    def scan(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda carry, _: (carry @ x, None), x, None, length=5)[0]

    assert count_flops(jax.make_jaxpr(scan)(x).jaxpr) == 5 * 2 * 4**3

    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() < 9, lambda x: x @ x, x)

    with pytest.raises(ValueError, match="unknown length"):
        count_flops(jax.make_jaxpr(loop)(x).jaxpr)


def test_the_summary_lists_every_part_and_the_parts_add_up() -> None:
    """The state of a router is no parameter."""
    config = models.model_config("vmoe_test_last2_e4", pre_logits=8)
    for router in (BiasBalanced(), TokenChoice(images_per_group=2)):
        config = replace(config, moe=replace(config.moe, router=router))
        parts = parameters_by_part(config)
        assert sum(parts.values()) == cost(config).parameters
    text = summarize(config, title="tiny")
    for part in ("patch embedding", "class token", "positions", "routers", "experts", "head"):
        assert part in text and part in parts
    assert "block 3: 4 experts, token_choice, 20 slots each for the 34 tokens of 2 images" in text


def test_the_summary_tells_shared_experts_from_mlps_and_names_a_gate() -> None:
    without = models.model_config("vmoe_test_last2_e4", moe=dict(gate=CosineGate()))
    config = replace(without, moe=dict(shared_experts=2, shared_gate=True))
    parts, d, f = parameters_by_part(config), 16, 2 * 32
    assert parts.pop("shared experts") == 2 * (2 * d * f + f + d + d)  # in two blocks
    assert parts == parameters_by_part(without)
    assert sum(parts.values()) < cost(config).parameters == sum(parameters_by_part(config).values())
    assert "block 3: 4 experts and 2 gated shared, token_choice with gate cosine" in summarize(
        config
    )


def test_a_function_is_compiled_once_for_models_that_differ_in_parameters_and_changes_none() -> (
    None
):
    """The function removes the classes, so a model that it had changed would have no logits."""
    traced: list[float] = []

    @models.compiled
    def scaled_features(model: ViT, factor: float, images: jax.Array) -> jax.Array:
        traced.append(factor)
        model.head.classes = None
        return factor * model(images)

    config = models.model_config("vit_test", depth=1, pre_logits=24)
    shape = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    program = scaled_features(models.build_abstract(config), 2.0)
    assert models.shapes_of(program, shape).shape == (2, 24)
    images = jnp.linspace(-1, 1, 2 * 32 * 32 * 3).reshape(shape.shape)
    for seed in (0, 1):
        model = models.build(config, seed=seed)
        features = scaled_features(model, 2.0)(images)
        assert jax.eval_shape(model.__call__, images).shape == (2, 10)
        headless = models.build(replace(config, num_classes=0), seed=seed)
        np.testing.assert_allclose(
            features, 2 * jax.jit(headless.__call__)(images), rtol=1e-4, atol=1e-5
        )
    assert traced == [2.0]
