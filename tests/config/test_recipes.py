"""The recipes in configs/: every one loads, builds and trains when it is cut down."""

import functools
from pathlib import Path

import pytest

from tests.command import forked, vmoe
from vmoe import config as configs
from vmoe import models
from vmoe.config import DataConfig, TrainConfig
from vmoe.config.dry_run import cut_model, dry_run
from vmoe.config.preprocessing import Preprocessing

FOLDER = Path(__file__).parents[2] / "configs"
RECIPES = sorted(FOLDER.glob("*.py"))


@pytest.fixture(params=RECIPES, ids=[recipe.stem for recipe in RECIPES])
def config(request: pytest.FixtureRequest) -> TrainConfig:
    return configs.load(request.param)


def test_every_recipe_round_trips_through_json_and_builds(config: TrainConfig) -> None:
    assert configs.from_json(TrainConfig, configs.to_json(config)) == config
    models.build_abstract(cut_model(config.model))  # at its widths; all blocks are like these two
    assert len(set(config.model.moe_blocks.values())) <= 1


def test_photos_keep_their_aspect_in_the_recipe_for_images_of_users() -> None:
    """The pages name it for folders; its own drawings are squares, so their pixels are the same."""
    emoji = configs.load("emoji")
    assert emoji.data.preprocessing.keep_aspect and emoji.preprocessing.keep_aspect


@pytest.mark.long_after(4)
def test_a_step_of_every_cut_recipe_can_be_traced(config: TrainConfig) -> None:
    """In one size: recipes that differ in their sizes or learning rates alone are traced once."""
    model = dict(width=16, mlp_dim=32, num_heads=2, patch_size=4, image_size=8)
    if config.model.pre_logits:
        model |= dict(pre_logits=16)
    data = DataConfig(
        mixup=config.data.mixup,
        cutmix=config.data.cutmix,
        mixing=config.data.mixing,
        preprocessing=config.data.preprocessing,
    )
    trace_step(
        configs.replace(dry_run(config), model=model, data=data, optim=dict(lr=0.01, end_lr=0.0))
    )


@functools.cache
def trace_step(config: TrainConfig) -> None:
    import jax

    from vmoe.data.pipeline import empty_batch
    from vmoe.train.state import abstract_state
    from vmoe.train.step import make_train_step

    batch = empty_batch(config.batch_size, 1, Preprocessing(config.model.image_size))
    state, metrics = jax.eval_shape(make_train_step(config), abstract_state(config), batch)
    assert metrics["loss"].shape == ()


def test_a_cut_model_keeps_its_widths_and_has_a_dense_and_a_sparse_block() -> None:
    model = configs.load(FOLDER / "vmoe_15b.py").model
    cut = cut_model(model)
    assert (cut.width, cut.mlp_dim, cut.patch_size) == (1408, 6400, 14)
    assert (cut.depth, cut.sparse_blocks, cut.moe_blocks[1].num_experts) == (2, (1,), 4)
    assert cut.num_classes == 100


RECIPE = f"""
from pathlib import Path
from vmoe.config import EvalConfig, load, replace

config = replace(
    load(Path({str(FOLDER / "tiny.py")!r})), data=dict(name="folder:missing"),
    evaluations=(EvalConfig("held_out", "validation"), EvalConfig("test", "test")),
)
"""


@pytest.mark.process
def test_a_dry_run_trains_a_recipe_without_its_data_and_keeps_nothing(tmp_path: Path) -> None:
    recipe = tmp_path.with_suffix(".py")
    recipe.write_text(RECIPE)
    result = vmoe("train", "--config", recipe, "--dry-run", cwd=tmp_path)
    assert (result.returncode, len(result.stdout.splitlines())) == (0, 2), result.stderr
    assert "dry run: 2 steps, held_out accuracy" in result.stdout
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.process
def test_a_dry_run_works_on_any_number_of_devices(tmp_path: Path) -> None:
    """Six divide neither the batch of eight nor the four experts that one device has."""
    options = ["--data.mixup", "0.2", "--accumulate", "2", "--model.moe.num-experts", "16"]
    result = forked(
        *("train", "--config", FOLDER / "tiny.py", "--dry-run", *options, "--mesh", "expert=3"),
        environment={"JAX_NUM_CPU_DEVICES": "6"},
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert "6 devices" in result.stderr


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
