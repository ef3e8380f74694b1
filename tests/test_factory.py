"""Trained models from a path: loading, preprocessing of images, errors."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import vmoe
from tests.command import TINY
from tests.random_models import outputs
from tests.run_folder import with_corrupt_newest
from vmoe import config as configs
from vmoe.checkpoints.restore import restore
from vmoe.config import RoutingOverrides, TrainConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.crops import resize_and_crop
from vmoe.data.sources import open_source
from vmoe.errors import UsageError
from vmoe.nn.inputs import to_float
from vmoe.nn.mlp import Hidden, Mlp
from vmoe.nn.vit import ViT
from vmoe.train import train


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return configs.replace(
        configs.load(TINY), steps=4, checkpoint_every=2, ema_decay=0.5, optim=dict(warmup_steps=0)
    )


@pytest.fixture(scope="module")
def run(config: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("factory") / "run"
    train(config, workdir)
    return workdir


def test_a_loaded_run_has_its_model_config_classes_and_preprocessing(
    run: Path, config: TrainConfig
) -> None:
    loaded = vmoe.load(run)
    assert loaded.model.config == config.model and loaded.train_config == config
    assert loaded.class_names == tuple("0123456789")
    assert loaded.preprocessing == Preprocessing(image_size=8)
    assert loaded.step == 4 and loaded.origin[:3] == ("run", run, "ema")
    assert vmoe.load(run / "checkpoints" / "2").step == 2


def test_the_parameters_are_the_stored_ones_raw_or_ema(run: Path) -> None:
    """The oracle is the checkpoint item, read without the factory."""
    for use_ema, item in ((True, "ema"), (False, "params")):
        loaded = vmoe.load(run, use_ema=use_ema)
        params = nnx.to_pure_dict(nnx.state(loaded.model, nnx.Param))
        stored = restore((run / "checkpoints" / "4").absolute(), **{item: params})[item]
        jax.tree.map(np.testing.assert_array_equal, params, stored)
        assert loaded.origin.weights == ("ema" if use_ema else "raw")


@pytest.mark.process
def test_a_corrupt_checkpoint_is_one_line_on_stderr_in_python_too(
    tiny_run: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    with_corrupt_newest(tiny_run, workdir, step=60, newest=70)
    code = f"import vmoe; print(vmoe.load({str(workdir)!r}).step)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "60\n"
    assert result.stderr.startswith(f"{workdir}: checkpoint 70 is corrupt (")
    assert result.stderr.count("\n") == 1, result.stderr


def test_image_files_and_pixels_are_preprocessed_as_in_training(run: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2, 20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels[0]).save(tmp_path / "0.png")
    expected = to_float(np.stack([resize_and_crop(image, Preprocessing(8)) for image in pixels]))
    loaded = vmoe.load(run)
    np.testing.assert_array_equal(loaded.preprocess(pixels), expected)
    content = (tmp_path / "0.png").read_bytes()  # as the examples of a folder have it
    for image in (tmp_path / "0.png", content):
        np.testing.assert_array_equal(loaded.preprocess([image, pixels[1]]), expected)
    digits = open_source("digits", "test").images[:3]
    assert outputs(loaded.model, loaded.preprocess(digits)).shape == (3, 10)


def test_images_get_the_preprocessing_of_the_loaded_model(run: Path) -> None:
    preprocessing = Preprocessing(8, resize_to=10, keep_aspect=True, interpolation="bicubic")
    loaded = dataclasses.replace(vmoe.load(run), preprocessing=preprocessing)
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    resized = np.asarray(Image.fromarray(pixels).resize((15, 10), Image.Resampling.BICUBIC))
    expected = to_float(resized[1:9, 4:12])  # 3.5 columns are left on each side of the crop
    np.testing.assert_array_equal(loaded.preprocess([pixels])[0], expected)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("0.png", "images=0.png: give a list of images"),
        ([b"PNG"], r"images\[0\]: not an image, or in a format that cannot be read"),
        ([], r"images=\[\]: give at least one"),
        ([np.zeros((8, 8, 3))], r"images\[0\] is float64\[8, 8, 3\]: give a path, or RGB pixels"),
        ([np.zeros((8, 8), np.uint8)], r"images\[0\] is uint8\[8, 8\]"),
        (["gone.png"], "gone.png: no such file"),
    ],
)
def test_inputs_that_are_not_images_are_refused(run: Path, images: object, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        vmoe.load(run).preprocess(images)


def test_routing_can_be_overridden_without_changing_parameters(
    run: Path, config: TrainConfig
) -> None:
    loaded = vmoe.load(run, routing=RoutingOverrides(k=1, capacity_factor=0.5))
    moe = dict(router=dict(k=1, capacity_factor=0.5))
    assert loaded.model.config == configs.replace(config.model, moe=moe)
    trees = (
        nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (loaded.model, vmoe.load(run).model)
    )
    jax.tree.map(np.testing.assert_array_equal, *trees)
    with pytest.raises(UsageError, match="k=5 with model.moe.num_experts=4"):
        vmoe.load(run, routing=RoutingOverrides(k=5))


def test_a_changed_model_is_saved_with_its_classes_and_preprocessing(tmp_path: Path) -> None:
    dense = vmoe.load("vit_fashion_mnist")
    preprocessing = Preprocessing(28, resize_to=32)
    sparse = dataclasses.replace(
        dense, model=vmoe.upcycle(dense.model, num_experts=2), preprocessing=preprocessing
    )
    sparse.save(tmp_path / "sparse")
    loaded = vmoe.load(tmp_path / "sparse")
    assert loaded.model.config == sparse.model.config != dense.model.config
    assert loaded.preprocessing == preprocessing
    assert loaded.class_names == dense.class_names and loaded.step == dense.step
    trees = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (sparse.model, loaded.model))
    jax.tree.map(np.testing.assert_array_equal, *trees)
    with pytest.raises(UsageError, match="it is not empty; use another folder"):
        sparse.save(tmp_path / "sparse")


def test_a_model_of_ones_own_is_saved_with_its_classes_for_every_command(tmp_path: Path) -> None:
    model = vmoe.create_model("vmoe_test_last2_e4", num_classes=2, image_size=16)
    with pytest.raises(UsageError, match="class_names=3: give the 2 names of the logits"):
        vmoe.save(model, tmp_path / "own", class_names=["cat", "dog", "emu"])
    vmoe.save(model, tmp_path / "own", class_names=["cat", "dog"], step=7)
    loaded = vmoe.load(tmp_path / "own")
    assert loaded.model.config == model.config and loaded.class_names == ("cat", "dog")
    assert loaded.preprocessing == Preprocessing(16) and loaded.step == 7
    trees = (nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (model, loaded.model))
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_model_whose_layer_was_replaced_is_not_saved_as_another_one(tmp_path: Path) -> None:
    """Its outputs would differ from those of the model that is loaded."""

    def model() -> ViT:
        return vmoe.create_model("vmoe_test_last2_e4", image_size=16)

    names = list(map(str, range(10)))

    def own_experts(model: ViT) -> None:
        experts = [nnx.Linear(16, 16, rngs=nnx.Rngs(i)) for i in range(2)]
        model.blocks[2].mlp = vmoe.MoE(experts, nnx.Linear(16, 2, rngs=nnx.Rngs(9)))

    def other_activation(model: ViT) -> None:
        model.blocks[1].mlp.experts.hidden = Hidden("relu")

    def wider(model: ViT) -> None:
        model.blocks[0].mlp.up = nnx.Linear(16, 33, rngs=nnx.Rngs(0))

    def more_logits(model: ViT) -> None:
        model.blocks[3].mlp.gate.kernel = nnx.Param(jnp.zeros((16, 5)))

    for change, path in (
        (more_logits, "blocks/3/mlp/gate"),
        (own_experts, "blocks/2/mlp"),
        (other_activation, "blocks/1/mlp/experts"),
        (wider, "blocks/0/mlp/up"),
    ):
        changed = model()
        change(changed)
        with pytest.raises(UsageError, match=f"^{path} is not the .* config describes"):
            vmoe.save(changed, tmp_path / "saved", class_names=names)
    sparse = vmoe.moefy(model(), select=Mlp, num_experts=2)
    with pytest.raises(UsageError, match="^blocks/0/mlp is not the Mlp that"):
        vmoe.save(sparse, tmp_path / "saved", class_names=names)
    with pytest.raises(UsageError, match="^blocks/0/mlp is not the Mlp that"):
        vmoe.upcycle(sparse)
    assert not list(tmp_path.iterdir())


def test_a_named_model_has_the_parts_of_the_weights_that_it_starts_from(tmp_path: Path) -> None:
    parts = dict(registers=2, mlp="gated", attention_norm=True, attention_sink=True, head_dim=8)
    model = vmoe.create_model("vit_test", **parts, depth=4)
    vmoe.save(model, tmp_path / "own", class_names=list(map(str, range(10))))
    named = vmoe.create_model("vit_test", pretrained=tmp_path / "own")
    assert named.config == model.config


def test_a_tag_without_pretrained_is_refused() -> None:
    with pytest.raises(UsageError, match="a tag names trained weights; use pretrained=True"):
        vmoe.create_model("vit_fashion_mnist.best_of_3")


@pytest.mark.parametrize(
    ("name", "remedies"),
    [
        ("vit_tiny_patch16_224", ("hf://timm/vit_tiny_patch16_224", "that of vit_ti16_std")),
        ("vit_base_patch16_224.augreg_in1k", ("hf://timm/vit_base_patch16_224.augreg_in1k",)),
        ("timm/swin_tiny_patch4_window7_224", ("hf://timm/swin_tiny_patch4_window7_224",)),
        ("google/vit-base-patch16-224", ("hf://google/vit-base-patch16-224",)),
    ],
)
def test_names_of_the_hub_are_answered_with_their_url(name: str, remedies: tuple[str, ...]) -> None:
    for use in (
        lambda: vmoe.load(name),
        lambda: vmoe.load(Path(name).absolute()),  # as --init makes it
        lambda: vmoe.create_model(name),
        lambda: vmoe.create_model(name, pretrained=True),
        lambda: vmoe.create_model("vit_b16", pretrained=name),
    ):
        with pytest.raises(UsageError) as caught:
            use()
        for remedy in (*remedies, "`vmoe models` lists"):
            assert remedy in str(caught.value)


def test_a_path_without_a_model_is_refused_with_the_supported_formats(tmp_path: Path) -> None:
    for path, reason in (
        (tmp_path / "nowhere", "no such file, folder or model"),
        (tmp_path, "no checkpoint of a known format"),
    ):
        with pytest.raises(UsageError) as caught:
            vmoe.load(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: {reason}; give a run folder")
        assert "checkpoints/STEP" in message and "--" not in message
