"""The recipes in configs/: every one loads, builds and trains when it is cut down."""

from pathlib import Path

import pytest

from tests.command import vmoe
from vmoe import config as configs
from vmoe import models
from vmoe.config import TrainConfig
from vmoe.config.dry_run import cut_model, dry_run
from vmoe.config.preprocessing import Preprocessing

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(FOLDER.glob("*.py"))


@pytest.fixture(params=RECIPES, ids=[recipe.stem for recipe in RECIPES])
def config(request: pytest.FixtureRequest) -> TrainConfig:
    return configs.load(request.param)


def test_every_recipe_builds_and_round_trips_through_json(config: TrainConfig) -> None:
    assert configs.from_json(TrainConfig, configs.to_json(config)) == config
    models.build_abstract(config.model)


def test_a_step_of_every_cut_recipe_can_be_traced(config: TrainConfig) -> None:
    import jax

    from vmoe.data.pipeline import empty_batch
    from vmoe.train.state import abstract_state
    from vmoe.train.step import make_train_step

    cut = dry_run(config)
    batch = empty_batch(cut.batch_size, 1, Preprocessing(cut.model.image_size))
    state, metrics = jax.eval_shape(make_train_step(cut), abstract_state(cut), batch)
    assert metrics["loss"].shape == ()


def test_a_cut_model_keeps_its_widths_and_has_a_dense_and_a_sparse_block() -> None:
    model = configs.load(FOLDER / "vmoe_15b.py").model
    cut = cut_model(model)
    assert (cut.width, cut.mlp_dim, cut.patch_size) == (1408, 6400, 14)
    assert (cut.depth, cut.sparse_blocks, cut.moe_blocks[1].num_experts) == (2, (1,), 4)
    assert cut.num_classes == 100


def test_a_dry_run_trains_a_recipe_without_its_data_and_keeps_nothing(tmp_path: Path) -> None:
    recipe = str(FOLDER / "imagenet1k_s32_light.py")
    result = vmoe("train", "--config", recipe, "--dry-run", cwd=tmp_path)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 2), result.stderr
    assert "dry run: 2 steps, held_out accuracy" in result.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--init any", "--init any has no effect with --dry-run: leave it out"),
        ("--wandb", "--wandb has no effect with --dry-run: leave it out"),
        ("--wandb mine", "--wandb mine has no effect with --dry-run: leave it out"),
        ("--distributed", "--distributed has no effect with --dry-run: leave it out"),
    ],
)
def test_a_dry_run_refuses_what_only_a_kept_run_can_use(options: str, message: str) -> None:
    recipe = str(FOLDER / "tiny.py")
    result = vmoe("train", "--config", recipe, "--dry-run", *options.split())
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.endswith(f"{message}\n") and result.stderr.count("\n") == 1
