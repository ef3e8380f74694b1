"""Models of other families give the outputs of their own libraries; others are an error.

The files and what they must give are described in ``tests/golden/weights/README.md``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

import vmoe
from tests.command import ROOT
from tests.command import vmoe as command_of
from tests.random_models import outputs, stored_model
from vmoe import models
from vmoe.checkpoints import read, vmoe_format
from vmoe.checkpoints.inspection import inspect
from vmoe.config import Soft
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import UsageError, VmoeError
from vmoe.nn.vit import ViT

GOLDEN = ROOT / "tests" / "golden" / "weights"
MODELS = sorted(path.parent.name for path in GOLDEN.glob("*/expected.npz"))
RESIZED = sorted(path.parent.name for path in GOLDEN.glob("*/resized.npz"))


def path_of(folder: Path) -> Path:
    npz = folder / "model.npz"
    return npz if npz.exists() else folder


@models.compiled
def parts(model: ViT, images: jax.Array) -> dict[str, jax.Array]:
    tokens = model.forward_features(images)
    features = model.forward_head(tokens, pre_logits=True)
    return {"tokens": tokens, "features": features, "logits": model(images)}


@pytest.mark.parametrize(
    "name",
    [
        "hf_dinov2_registers",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("hf_dinov2", "hf_dinov3", "timm_eva02_clip", "siglino_moe")
        ),
    ],
)
def test_commands_inspect_and_probe_models_of_today_and_predict_with_their_heads(
    name: str, tmp_path: Path
) -> None:
    model = GOLDEN / name
    inspected = command_of("inspect", model)
    assert inspected.returncode == 0 and "parameters" in inspected.stdout, inspected.stderr
    for i in range(8):
        image = tmp_path / ("train", "test")[i // 4] / ("dark", "light")[i % 2] / f"{i}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (200 * (i % 2) + i,) * 3).save(image)
    data = ("--data", f"folder:{tmp_path}", "--shots", "1", "--batch-size", "2")
    probed = command_of("probe", "--checkpoint", model, *data, "--json")
    assert probed.returncode == 0, probed.stderr
    assert [*json.loads(probed.stdout)["accuracy"]] == [f"folder:{tmp_path}"]
    predicted = command_of("predict", "--checkpoint", model, image)
    if name == "timm_eva02_clip":  # the only one with a head
        assert predicted.returncode == 0 and "probability" in predicted.stdout, predicted.stderr
    else:
        assert predicted.returncode == 2 and "no classes" in predicted.stderr
        assert predicted.stderr.count("\n") <= 2, predicted.stderr


def test_the_readme_counts_these_models() -> None:
    readme = (ROOT / "README.md").read_text()
    assert f"| {len(MODELS)} small random models | 1e-5," in readme


@pytest.mark.parametrize("name", MODELS)
def test_the_model_gives_the_tokens_features_and_logits_of_its_library(name: str) -> None:
    assert_equal_outputs(name, "expected.npz")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name == "hf_dinov2" else pytest.mark.slow) for name in RESIZED],
)
def test_images_of_another_size_give_the_outputs_of_the_library_too(name: str) -> None:
    """Positions are resampled as each library does it, to fewer rows and more columns."""
    assert_equal_outputs(name, "resized.npz")


@pytest.mark.parametrize(
    ("name", "resampling"),
    [
        ("timm_vit", "bicubic_antialias"),
        ("hf_vit", "bicubic"),
        ("hf_dinov2_registers", "bicubic_antialias"),
    ],
)
def test_positions_are_resampled_by_the_method_of_the_library(name: str, resampling: str) -> None:
    found = inspect(path_of(GOLDEN / name)).model
    assert found is not None and found.config.position_resampling == resampling


def test_positions_of_another_size_than_the_images_are_no_assumption(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "hf_dinov2", tmp_path, dirs_exist_ok=True)
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    images["crop_size"] = {"height": 12, "width": 12}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(images))
    found = inspect(tmp_path).model
    assert found is not None and found.config.image_size == 16
    assert found.preprocessing.image_size == 12
    assert found.origin.assumed == ("no classes, since no array is a head",)


def assert_equal_outputs(name: str, file: str) -> None:
    model = vmoe.load(path_of(GOLDEN / name)).model
    with np.load(GOLDEN / name / file) as expected:
        found = parts(model)(expected["images"])
        for key in set(found) & set(expected.files):
            scale = np.abs(expected[key]).max()
            np.testing.assert_allclose(found[key] / scale, expected[key] / scale, atol=1e-5)


CLASSES = ("plum", "pear", "fig", "lime", "kiwi", "date", "sloe", "nut", "hop", "rye")
BELONGINGS = {
    "timm_vit": (Preprocessing(16, 17, True, "bicubic"), True),
    "timm_no_qkv_bias": (Preprocessing(16, 18, True, "bilinear"), False),
    "hf_vit": (Preprocessing(16, 16, interpolation="torch_bilinear"), True),
    "hf_dinov2": (Preprocessing(16, 18, True, "torch_bicubic"), False),
    "augreg": (Preprocessing(16, interpolation="tf_bilinear", exif=False), False),
}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(architecture="vit_base_patch16_rpn_224"), "is not a plain ViT of timm"),
        (dict(architecture="swin_base_patch4_window7_224"), "deit3, flexivit, eva, eva02 can"),
        (
            dict(architecture="eva02_enormous_patch14_clip_224"),
            "such as vit_base_patch16_224; sizes",
        ),
        (dict(model_args=dict(norm_layer="batchnorm2d")), "norm_layer 'batchnorm2d' cannot be"),
        (
            dict(model_args=dict(act_layer="elu")),
            "act_layer 'elu' cannot be represented; opened are gelu, gelu_tanh",
        ),
        (
            dict(architecture="eva02_base_patch14_224", model_args=dict(norm_layer="rmsnorm")),
            "norm_layer 'rmsnorm' cannot be represented; opened are only models",
        ),
        (dict(global_pool="max"), "global_pool 'max' cannot be represented; opened are token, avg"),
        (dict(pretrained_cfg=dict(crop_pct=1e-12)), "crop_pct 1e-12: use 0.1 to 1"),
    ],
)
def test_settings_of_timm_that_no_parameter_shows_are_read_or_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "timm_vit", folder)
    config = json.loads((folder / "config.json").read_text())
    arguments = config["model_args"]
    if "global_pool" in changes:
        del arguments["global_pool"]
    changes = changes | {"model_args": arguments | changes.get("model_args", {})}
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UsageError) as caught:
        vmoe.load(folder)
    assert reason in str(caught.value)
    arguments = arguments | {"act_layer": "quick_gelu", "global_pool": "token"}
    (folder / "config.json").write_text(json.dumps(config | {"model_args": arguments}))
    assert vmoe.load(folder).model.config.activation == "quick_gelu"


@pytest.mark.parametrize(("patch", "gelu"), [(14, "gelu"), (16, "gelu_tanh")])
def test_towers_of_siglip_have_the_gelu_that_timm_gives_them(
    patch: int, gelu: str, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "timm_siglip", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["architecture"] = f"vit_so400m_patch{patch}_siglip_224"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read(tmp_path).config.activation == gelu


def test_the_name_of_the_architecture_is_enough_of_a_config_for_timm(tmp_path: Path) -> None:
    shutil.copy(GOLDEN / "timm_vit" / "model.safetensors", tmp_path)
    with pytest.raises(UsageError, match='its name is enough: {"architecture": "vit_base_patch'):
        vmoe.load(tmp_path)
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    bare, whole = (vmoe.load(folder).model for folder in (tmp_path, GOLDEN / "timm_vit"))
    assert bare.config == whole.config
    jax.tree.map(np.testing.assert_array_equal, models.params_of(bare), models.params_of(whole))


@pytest.mark.parametrize("name", BELONGINGS)
def test_class_names_and_preprocessing_come_with_the_weights(name: str) -> None:
    loaded = vmoe.load(path_of(GOLDEN / name))
    preprocessing, named = BELONGINGS[name]
    assert loaded.preprocessing == preprocessing
    if loaded.model.config.num_classes:
        assert loaded.class_names == (CLASSES if named else tuple("0123456789"))


def test_a_named_model_takes_sizes_and_gelu_from_weights_and_reports_what_is_new(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = dict(depth=2, width=24, mlp_dim=48, num_heads=3, patch_size=4)
    source = GOLDEN / "timm_vit"
    model = vmoe.create_model("vit_test", pretrained=source, **sizes)
    with np.load(source / "expected.npz") as expected:
        logits = outputs(model, expected["images"])
        np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    assert "parameters new" not in capsys.readouterr().err
    model = vmoe.create_model("vit_test", pretrained=source, num_classes=3, image_size=8, **sizes)
    images = jax.ShapeDtypeStruct((1, 8, 8, 3), np.float32)
    assert jax.eval_shape(model, images).shape == (1, 3)
    assert model.config.position_resampling == "bicubic_antialias"
    stderr = capsys.readouterr().err
    assert "vit_test: 2 parameters new: head/classes/" in stderr
    assert "vit_test: 1 parameters resized: positions/embedding" in stderr


def test_fields_that_do_not_fit_the_arrays_are_refused() -> None:
    with pytest.raises(UsageError, match="head/classes/.* has shape"):
        vmoe.load(GOLDEN / "timm_vit", model={"num_classes": 5})


@pytest.mark.parametrize(
    "name",
    [
        "augreg",
        "timm_layer_scale",
        "timm_clip",
        "hf_vit",
        "hf_dinov2_registers",
        "timm_eva02_clip",
        "timm_eva02_norm",
        "big_vision_map",
        "hf_dinov3_gated",
        "siglino_moe",
        "siglino_dense",
    ],
)
def test_a_model_without_any_one_of_its_arrays_is_refused_by_its_name(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / name, folder)
    npz, safetensors = folder / "model.npz", folder / "model.safetensors"
    arrays = dict(np.load(npz)) if npz.exists() else load_file(safetensors)
    paths_of = {array.name: array.paths for array in inspect(path_of(folder)).arrays}
    for missing in arrays:
        rest = {other: array for other, array in arrays.items() if other != missing}
        np.savez(npz, **rest) if npz.exists() else save_file(rest, safetensors)
        if missing.endswith("/pos_embedding"):
            assert "positions=sincos2d" in read(npz).origin.assumed[0]
            continue
        if not paths_of[missing]:
            read(folder)
            continue
        with pytest.raises(UsageError, match=r"missing|it has no ") as caught:
            read(path_of(folder))
        paths = (path.removesuffix("/scale") for path in paths_of[missing])
        names = (missing.rpartition("embeddings.")[2], *paths)
        assert any(name in str(caught.value) for name in names), (missing, caught.value)


def test_tokens_of_siglino_choose_the_experts_that_they_choose_in_its_own_code() -> None:
    loaded = vmoe.load(GOLDEN / "siglino_moe")
    assert {name.partition(".")[0] for name in loaded.origin.unused} == {
        *("dinov3_adapter", "layer_norm_dinov3", "siglip2_adapter", "freqs_cis_golden"),
        "siglip2_multihead_attention_pooling_head",
    }
    with np.load(GOLDEN / "siglino_moe" / "expected.npz") as expected:
        _, records = loaded.model.forward(expected["images"])
        for i, record in records.items():
            assert not record.routing.dropped.any()
            chosen = np.reshape(record.routing.experts, expected[f"experts{i}"].shape)
            np.testing.assert_array_equal(chosen, expected[f"experts{i}"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(n_kv_heads=1), "n_kv_heads 1 cannot be represented; opened is 3"),
        (dict(parameterized_norm=False), "parameterized_norm False cannot be represented"),
        (dict(activation="relu2"), "activation 'relu2' cannot be represented; opened is 'silu'"),
        (dict(moe_args=dict(activation="relu2")), "moe_args.activation 'relu2' cannot be"),
        (dict(moe_args=dict(num_shared_experts=1)), "moe_args.num_shared_experts 1 cannot be"),
        (dict(moe_args=dict(score_before_experts=True)), "moe_args.score_before_experts True"),
        (dict(rope_min_freqs=0), "model.safetensors: model.rotary.lowest=0.0"),
        (dict(moe_args=dict(top_k=8)), "lower k or add experts"),
        (dict(n_heads=4, n_kv_heads=4), "attention/sink has shape (3,)"),
        (dict(n_storage_tokens=3), "registers has shape (1, 4, 24), but (1, 3, 24) fits"),
        (dict(moe_args=None), "config.json"),
    ],
)
def test_settings_of_siglino_are_read_or_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "siglino_moe", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    if changes.get("moe_args"):
        changes = {"moe_args": config["moe_args"] | changes["moe_args"]}
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(VmoeError) as caught:
        vmoe.load(tmp_path)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm_distilled", "dist_token"),
        ("timm_qk_norm", "q_norm"),
        ("timm_swin", "swin"),
        ("hf_deit", "distillation_token"),
        ("hf_dinov2_classifier", "head/classes/kernel has shape"),
        ("npz_hybrid", "conv_root"),
    ],
)
def test_a_model_that_cannot_be_represented_is_refused_by_parameter(name: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        vmoe.load(path_of(GOLDEN / "refused" / name))
    assert reason in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("siglino_moe", "layers.0.moe.experts.w1"),
        ("siglino_moe", "img_projector.weight"),
        ("timm_eva02_clip", "blocks.0.attn.proj.weight"),
    ],
)
def test_an_array_with_other_axes_is_refused_by_its_name(
    name: str, array: str, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / name, tmp_path, dirs_exist_ok=True)
    arrays = load_file(tmp_path / "model.safetensors")
    arrays[array] = arrays[array].reshape(-1, 1, 1, 1, 1)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(UsageError, match=f"{array} has shape"):
        read(tmp_path)


@pytest.mark.parametrize("number", [None, "4"])
def test_a_number_of_registers_that_is_none_is_refused_in_one_line(
    number: Any, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "hf_dinov2_registers", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_register_tokens": number}))
    with pytest.raises(UsageError, match=f"model.registers={number}"):
        read(tmp_path)


def test_a_model_of_no_registers_has_none(tmp_path: Path) -> None:
    """transformers writes an array without values for them."""
    shutil.copytree(GOLDEN / "hf_dinov2_registers", tmp_path, dirs_exist_ok=True)
    arrays = load_file(tmp_path / "model.safetensors")
    arrays["embeddings.register_tokens"] = arrays["embeddings.register_tokens"][:, :0]
    save_file(arrays, tmp_path / "model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_register_tokens": 0}))
    assert read(tmp_path).config.registers == 0


def test_positions_of_registers_are_added_to_them_also_beside_a_class_token(tmp_path: Path) -> None:
    """timm adds positions to the class token, the registers and the patches, in this order."""
    own = changed_positions(tmp_path, np.random.default_rng(0), n=1 + 4 + 16)
    before, after = read(GOLDEN / "timm_registers").params, read(tmp_path).params
    np.testing.assert_allclose(after["registers"], before["registers"] + own[:, 1:5], rtol=1e-6)
    patches = np.delete(own, slice(1, 5), axis=1)
    np.testing.assert_array_equal(after["positions"]["embedding"], patches)


def test_positions_that_fit_two_grids_are_read_by_the_size_that_the_config_names(
    tmp_path: Path,
) -> None:
    """25 positions are of 5 x 5 patches, or of a class token, 8 registers and 4 x 4 patches."""
    changed_positions(tmp_path, np.random.default_rng(0), n=25, registers=8)
    config = json.loads((tmp_path / "config.json").read_text())
    for size in (16, 20, 24):
        config["model_args"] |= dict(img_size=[size, size], reg_tokens=8)
        (tmp_path / "config.json").write_text(json.dumps(config))
        if size != 24:
            assert read(tmp_path).config.image_size == size
    with pytest.raises(UsageError, match="images may be of 16 or 20 pixels, but image_size is 24"):
        read(tmp_path)


def changed_positions(
    folder: Path, draw: np.random.Generator, n: int, registers: int = 4
) -> np.ndarray:
    """Writes a model of timm with class token and registers, with n positions of its own."""
    shutil.copytree(GOLDEN / "timm_registers", folder, dirs_exist_ok=True)
    arrays = load_file(folder / "model.safetensors")
    arrays["reg_token"] = np.resize(arrays["reg_token"], (1, registers, 16))
    arrays["pos_embed"] = draw.standard_normal((1, n, 16), np.float32)
    save_file(arrays, folder / "model.safetensors")
    return arrays["pos_embed"]


GATE, UP, WHOLE = (f"blocks.0.mlp.fc1{half}.weight" for half in ("_g", "_x", ""))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({UP: None}, f"is in two arrays of equal shapes, here {GATE} (16, 32) and a missing one"),
        ({GATE: None}, f"is in two arrays of equal shapes, here a missing one and {UP} (16, 32)"),
        ({WHOLE: np.zeros((64, 16), np.float32)}, f"up/kernel: {WHOLE} and {GATE}"),
        ({WHOLE: np.zeros((64, 16), np.float32), GATE: None}, f"up/kernel: {WHOLE} and {UP}"),
    ],
    ids=["first", "second", "whole", "whole_and_second"],
)
def test_halves_of_a_gated_mlp_are_told_by_the_names_of_their_arrays(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    shutil.copytree(GOLDEN / "timm_eva02_clip", tmp_path, dirs_exist_ok=True)
    arrays = load_file(tmp_path / "model.safetensors") | changes
    kept = {name: array for name, array in arrays.items() if array is not None}
    save_file(kept, tmp_path / "model.safetensors")
    inspection = inspect(tmp_path)
    assert inspection.model is None and reason in inspection.reason
    paths = {path for each in inspection.arrays for path in each.paths or ()}
    assert "blocks/0/mlp/up/kernel" in paths and not any(path[-2:] == "/0" for path in paths)


def test_a_written_folder_gives_the_parameters_back_scalars_too(tmp_path: Path) -> None:
    moe = dict(router=Soft())
    stored = stored_model("vmoe_test_last2_e4", depth=2, sparse_blocks=(1,), moe=moe)
    vmoe_format.write(tmp_path, stored, shard_bytes=10_000)
    jax.tree.map(np.testing.assert_array_equal, read(tmp_path).params, stored.params)
