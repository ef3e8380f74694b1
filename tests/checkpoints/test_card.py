"""A model card states what the files of a model tell, and nothing else."""

from pathlib import Path

import pytest
import yaml

from tests.command import vmoe
from tests.random_models import stored_of
from vmoe import zoo
from vmoe.checkpoints import Origin, StoredModel, read, write
from vmoe.config import (
    CnnExpert,
    CosineGate,
    Hash,
    MoEConfig,
    RoutingOverrides,
    ViTConfig,
    replace,
)

CARD = "README.md"
WEIGHTS = zoo.PACKAGED / "vmoe_fashion_mnist"


def card(stored: StoredModel, folder: Path) -> str:
    write(stored, folder, format="vmoe")
    return (folder / CARD).read_text()


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


def test_the_card_of_a_converted_run_names_its_data_and_invents_no_license_or_accuracy(
    tiny_run: Path, tmp_path: Path
) -> None:
    result = vmoe("convert", tiny_run, "photos", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    text = (tmp_path / "photos" / CARD).read_text()
    metadata, config = yaml.safe_load(text.split("---\n")[1]), read(tiny_run).train_config
    assert config is not None
    assert metadata.keys() == {"library_name", "pipeline_tag", "tags"}
    assert metadata["pipeline_tag"] == "image-classification"
    assert f"`{config.data.name}`" in section(text, "Training data")
    assert f"batches of {config.batch_size} images" in section(text, "Training data")
    for title in ("Training data", "Accuracy", "License"):
        assert "Not stated" in section(text, title), title
    assert 'vmoe.load("photos")' in text
    assert max(map(len, text.splitlines())) <= 100 or "| images |" in text


def test_a_card_shows_the_last_part_of_the_path_of_its_data_only(
    tiny_run: Path, tmp_path: Path
) -> None:
    stored = read(tiny_run)
    assert stored.train_config is not None
    config = replace(stored.train_config, data=dict(name="folder:/home/someone/photos"))
    text = card(stored._replace(train_config=config), tmp_path / "model")
    assert "`folder:photos`" in text and "someone" not in text


def test_a_card_names_the_training_of_weights_of_the_zoo_but_of_no_others(tmp_path: Path) -> None:
    published = "/weights/vmoe_s32_last2_ilsvrc2012_randaug_light1"
    stored = read("vmoe_fashion_mnist")
    light = stored._replace(origin=Origin("published", Path(published)))
    other = stored._replace(origin=Origin("published", Path("/weights/mine")))
    texts = {
        name: section(card(each, tmp_path / name), "Training data")
        for name, each in {"packaged": stored, "light": light, "other": other}.items()
    }
    assert (
        "Fashion-MNIST" in texts["packaged"]
        and "`vmoe_fashion_mnist.best_of_3`" in texts["packaged"]
    )
    assert "ImageNet-1k from scratch, 300 epochs" in texts["light"]
    assert texts["other"].strip() == "Not stated."


@pytest.mark.parametrize(
    ("routing", "competing"),
    [
        (RoutingOverrides(), 8),
        (RoutingOverrides(images_per_group=2), 2),
        (RoutingOverrides(images_per_group=1), 0),
        (RoutingOverrides(dropless=True), 0),
        (RoutingOverrides(capacity_factor=4.0), 0),  # 8 experts, k = 2: a slot for every token
    ],
)
def test_a_card_says_how_many_images_compete_for_slots(
    routing: RoutingOverrides, competing: int, tmp_path: Path
) -> None:
    stored = read(WEIGHTS)
    stored = stored._replace(config=routing.apply(stored.config))
    limits = section(card(stored, tmp_path / "model"), "Limits")
    assert (f"up to {competing} images compete" in limits) == (competing > 0)
    assert ("does not depend on the other images" in limits) == (competing == 0)


def test_a_card_names_the_routers_the_gates_and_the_experts_of_a_sparse_model(
    tmp_path: Path,
) -> None:
    layers = (
        MoEConfig(num_experts=4),
        MoEConfig(
            num_experts=4,
            experts=CnnExpert(),
            shared_experts=2,
            shared_gate=True,
            gate=CosineGate(),
        ),
        MoEConfig(num_experts=2, router=Hash(k=1)),
    )
    config = ViTConfig(patch_size=8, image_size=8, width=8, num_heads=1, mlp_dim=8, num_classes=3)
    stored = stored_of(replace(config, sparse_blocks=(1, 3, 5), moe=layers))
    text = card(stored, tmp_path / "model")
    assert "| experts | 4 in block 1; 4 (cnn) and 2 gated shared in block 3; 2 in block 5 |" in text
    assert (
        "| routers | token_choice with a linear gate in block 1; token_choice with a cosine gate "
        "in block 3; hash in block 5 |"
    ) in text


def test_the_card_of_a_dense_model_mentions_no_experts(tmp_path: Path) -> None:
    text = card(read("vit_fashion_mnist"), tmp_path / "model")
    limits = section(text, "Limits")
    every = card(read(WEIGHTS), tmp_path / "sparse")
    assert "| experts | 8 in blocks 1, 3, 5 |" in every
    assert "| experts | none |" in text and "| routers |" not in text
    assert "does not depend on the other images" in limits and "expert" not in limits
