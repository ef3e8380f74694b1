"""The trained models that come with the package, and the images to try them on."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

import vmoe
from scripts.maintain import zoo as zoo_script
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


@pytest.mark.long_after(1)
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
    size = (Path(entry.path) / "model.safetensors").stat().st_size
    assert entry.nbytes < size < entry.nbytes + 10_000
    model = vmoe.create_model(f"{name}.best_of_3", pretrained=True)
    for ours, theirs in zip(parameters(model), parameters(loaded.model), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_card_of_a_packaged_model_is_what_the_script_writes_today(name: str) -> None:
    """From the measurements next to it; else run ``python -m scripts.maintain.zoo``
    with ``--keep measurements``."""
    folder = zoo.PACKAGED / name
    assert (folder / "README.md").read_text() == zoo_script.card_of(name)
    metadata = yaml.safe_load(zoo_script.card_of(name).split("---\n")[1])
    assert metadata["license"] == "apache-2.0" and metadata["library_name"] == "vmoe"
    (result,) = metadata["model-index"][0]["results"]
    entry = zoo.find(name)
    assert entry is not None and result["metrics"][0]["value"] in entry.accuracies.values()


@pytest.mark.parametrize("name", SAMPLES)
def test_an_entry_states_the_measured_accuracies(name: str) -> None:
    measured = json.loads((zoo.PACKAGED / name / "measured.json").read_text())["accuracies"]
    entry = zoo.find(name)
    assert entry is not None
    on_test = {split: row for split, row in measured.items() if split.endswith(":test")}
    stated = [round(100 * row["accuracy"], 2) for row in on_test.values()]
    assert [*entry.accuracies.values()] == stated


def test_a_card_counts_both_drawings_of_an_emoji_once_and_says_what_chose_the_model() -> None:
    name = "vmoe_emoji"
    measured = json.loads((zoo.PACKAGED / name / "measured.json").read_text())["accuracies"]
    row, card = measured["folder:data/emoji:test"], (zoo.PACKAGED / name / "README.md").read_text()
    independent = np.sqrt(row["accuracy"] * (1 - row["accuracy"]) / row["images"])
    assert 1.2 * independent < row["error"] < np.sqrt(2) * independent
    assert "| 384 | 63.54 ± 3.13 |" in card and "standard error over the emoji" in card
    assert "The validation split chose the seed, so its accuracy is optimistic." in card


@pytest.mark.slow
def test_the_predictions_that_depend_on_the_batch_are_as_many_as_the_card_says() -> None:
    """Up to two images: other machines may round a close decision differently."""
    name, data = "vmoe_emoji", "emoji_sample"
    stated = json.loads((zoo.PACKAGED / name / "measured.json").read_text())["dependence"]
    result = command.vmoe("routing", "--checkpoint", name, "--data", data, "--json")
    found = json.loads(result.stdout)["changed_by_batch"]
    assert found == pytest.approx(stated["changed"], abs=2.1 / stated["images"])
    card = (zoo.PACKAGED / name / "README.md").read_text()
    assert f"{stated['changed']:.1%} of the predictions on {stated['images']} images" in card


@pytest.mark.slow
def test_the_script_writes_the_best_run_with_its_card(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_run, tmp_path / "run-0")
    monkeypatch.setattr(zoo_script, "SEEDS", (0,))
    monkeypatch.setattr(zoo_script, "vmoe", lambda *words: json.loads(command.vmoe(*words).stdout))
    digits = zoo_script.DATA["fashion_mnist"]._replace(name="digits", sample=("digits", 8))
    monkeypatch.setattr(zoo_script, "DATA", {"digits": digits})
    model = zoo_script.Model(str(tmp_path / "run"), "tiny.py", "digits")
    monkeypatch.setattr(zoo_script, "MODELS", {"tiny": model})
    monkeypatch.setattr(zoo_script, "path_of", lambda name: tmp_path / f"{name}.npz")
    monkeypatch.setattr(zoo, "PACKAGED", tmp_path / "zoo")
    monkeypatch.setattr("sys.argv", ["zoo", "tiny", "--digits", "digits"])
    zoo_script.main()
    text = (tmp_path / "zoo" / "tiny" / "README.md").read_text()
    assert "run-0 (run, raw weights)" in text and "| `digits:test` | 360 | " in text
    assert "% of the predictions on 8 images of `digits` depend" in text
    assert np.load(tmp_path / "digits.npz")["images"].shape == (8, 8, 8)
    assert vmoe.load(tmp_path / "zoo" / "tiny").class_names == tuple("0123456789")


def parameters(model: ViT) -> list[np.ndarray]:
    return jax.tree.leaves(models.params_of(model))


def test_the_sample_has_test_images_of_every_class_and_nothing_to_train_on() -> None:
    sample = open_source("fashion_mnist_sample", "test")
    assert sample[511].image.shape == (28, 28, 3) and sample[511].origin.endswith("test[511]")
    assert set(sample.labels) == set(range(10))
    for name in ("train", "validation"):
        with pytest.raises(UsageError, match=f"fashion_mnist_sample has no split '{name}'"):
            open_source("fashion_mnist_sample", name)
