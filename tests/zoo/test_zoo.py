"""The trained models that come with the package, and the images to try them on."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import vmoe
from tests import command
from vmoe import models, zoo
from vmoe.data.sources import open_source
from vmoe.errors import UsageError
from vmoe.nn.vit import ViT

SAMPLES = {
    "vmoe_fashion_mnist": ("fashion_mnist_sample", 512),
    "vit_fashion_mnist": ("fashion_mnist_sample", 512),
    "vmoe_emoji": ("emoji_sample", 128),
}
"""By model: the sample of its test images, and their number."""


@pytest.mark.parametrize(("name", "sample"), SAMPLES.items())
def test_a_packaged_model_has_the_accuracy_that_its_entry_states(
    name: str, sample: tuple[str, int], tmp_path: Path
) -> None:
    """Up to two images: other machines may round a close decision differently."""
    data, images = sample
    result = command.vmoe("evaluate", "--checkpoint", name, "--data", data, "--json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    evaluation, entry = json.loads(result.stdout), zoo.find(name)
    assert entry is not None and evaluation["images"] == images
    stated = entry.accuracies[data]
    assert evaluation["accuracy"] == pytest.approx(stated / 100, abs=2.1 / images)


@pytest.mark.parametrize(("name", "sample"), SAMPLES.items())
def test_a_packaged_model_is_created_by_its_name_with_or_without_tag(
    name: str, sample: tuple[str, int]
) -> None:
    loaded, entry = vmoe.load(name), zoo.find(f"{name}.best_of_3")
    assert entry is not None and loaded.model.config == entry.config
    assert loaded.class_names == open_source(sample[0], "test").class_names
    size = (Path(entry.address) / "model.safetensors").stat().st_size
    assert entry.nbytes < size < entry.nbytes + 10_000
    model = vmoe.create_model(f"{name}.best_of_3", pretrained=True)
    for ours, theirs in zip(parameters(model), parameters(loaded.model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_card_of_a_packaged_model_says_what_would_be_written_today(
    name: str, tmp_path: Path
) -> None:
    vmoe.load(name).save(tmp_path / name)
    written, ours = (
        (folder / name / "README.md").read_text().partition("| converted from")[0]
        for folder in (tmp_path, zoo.PACKAGED)
    )
    assert ours == written


def parameters(model: ViT) -> list[np.ndarray]:
    return jax.tree.leaves(models.params_of(model))


def test_the_sample_has_test_images_of_every_class_and_nothing_to_train_on() -> None:
    sample = open_source("fashion_mnist_sample", "test")
    assert sample[511].image.shape == (28, 28, 3) and sample[511].origin.endswith("test[511]")
    assert set(sample.labels) == set(range(10))
    for name in ("train", "validation"):
        with pytest.raises(UsageError, match=f"fashion_mnist_sample has no split '{name}'"):
            open_source("fashion_mnist_sample", name)
