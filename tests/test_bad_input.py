"""Wrong input through the real command: one clear line, status 2, and nothing written.

In the cases ``{run}`` is a trained run, ``{tiny}`` its config file; they run in ``files``.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.command import TINY, interpreter, vmoe
from tests.data.open_files import no_more_files
from vmoe import retry
from vmoe.checkpoints.restore import read_metrics
from vmoe.data.sources import SPLITS, open_source
from vmoe.errors import Failure, VmoeError
from vmoe.train.wandb_writer import check_wandb
from vmoe.workdir.inference import read_inference
from vmoe.workdir.layout import (
    read_class_names,
    read_config,
    read_environment,
    read_init,
    steps_of,
)

RECIPE = "from vmoe.config import *\nconfig = replace(TrainConfig(), {})\n"
TRAIN = ["train", "--workdir", "new", "--config"]
TINY_TRAIN = [*TRAIN, "{tiny}"]
LR_FACTORS = ("head", "routers", "experts", "others")
EVALUATE = ["evaluate", "--checkpoint", "{run}"]
PREDICT = ["predict", "--checkpoint", "{run}"]


@pytest.fixture(scope="module")
def files(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the cases name; no case changes anything in it."""
    folder = tmp_path_factory.mktemp("files")
    for name, text in {
        "syntax.py": "config = (\n",
        "import.py": "import nothing_like_it\n",
        "key.py": RECIPE.format("stepz=3"),
        "type.py": RECIPE.format("steps='many'"),
        "nothing.py": "confg = 3\n",
        "raises.py": "x = 1\nconfig = 1 / 0\n",
        "exits.py": "import sys\nsys.exit('no disk')\n",
        "unknown_field.py": "from vmoe.config import *\nconfig = TrainConfig(modle=1)\n",
        "unknown_nested_field.py": "from vmoe.config import *\nconfig = ViTConfig(widht=1)\n",
        "dense_set.py": RECIPE.format(
            "evaluations=(EvalConfig('one', routing=RoutingOverrides(k=1)),)"
        ),
        "half.json": '{"model": ',
        "router.py": RECIPE.format("model=dict(moe=dict(num_experts=1))"),
        "blocks.py": RECIPE.format("model=dict(sparse_blocks=(1, 3), moe=(MoEConfig(),))"),
        "soft.py": RECIPE.format("model=dict(moe=dict(router='soft'))"),
        "soft_rows.py": RECIPE.format(
            "model=dict(moe=MoEConfig(router=Soft(), images_per_group=1, implementation='ragged'))"
        ),
        "soft_set.py": RECIPE.format(
            "model=dict(sparse_blocks=(1,), moe=MoEConfig(router=Soft(), images_per_group=1)), "
            "evaluations=(EvalConfig(routing=RoutingOverrides(capacity_factor=4.0)),)"
        ),
        "dropless.py": RECIPE.format("model=dict(moe=dict(router=ExpertChoice(), dropless=True))"),
        "decay.py": RECIPE.format("optim=dict(weight_decay=0.3)"),
        "data.py": RECIPE.format("data='digits'"),
        "no.png": "not an image",
        "rows.csv": "other,columns\n",
        "unlabelled.csv": "path,label\n" + "".join(f"photos/cat/{i}.png,\n" for i in range(12)),
        "unlabelled_set.csv": "path,label,split\n"
        + "".join(f"photos/cat/{i}.png,{'' if i else 'cat'},{SPLITS[i % 3]}\n" for i in range(12)),
    }.items():
        (folder / name).write_text(text)
    (folder / "bytes.py").write_bytes(b"\0\1\2")
    os.mkfifo(folder / "pipe")
    for kind in ("photos", "broken", "sparse", "whole"):
        for name in ("cat", "dog"):
            (folder / kind / name).mkdir(parents=True)
            for i in range(12 if kind != "sparse" else 2):
                pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / kind / name / f"{i}.png")
    for path in (folder / "broken" / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:1000])
    shutil.copy(folder / "broken" / "cat" / "0.png", folder / "half.png")
    (folder / "photos" / "emu").mkdir()
    (folder / "empty").mkdir()
    np.savez(folder / "whole.npz", images=np.zeros((30, 8, 8), np.uint8), labels=np.zeros(30, int))
    (folder / "half.npz").write_bytes((folder / "whole.npz").read_bytes()[:500])
    np.savez(folder / "float.npz", images=np.zeros((30, 8, 8)), labels=np.zeros(30, int))
    for name in ("cut", "words", "field", "names", "none", "no_config"):
        shutil.copytree(tiny_run, folder / name)
    for path in (folder / "cut" / "checkpoints").rglob("d/*"):
        path.write_bytes(path.read_bytes()[:100])
    (folder / "words" / "config.json").write_text('{"model": ')
    config = json.loads((tiny_run / "config.json").read_text())
    (folder / "field" / "config.json").write_text(json.dumps(config | {"stepz": 3}))
    (folder / "names" / "classes.json").unlink()
    (folder / "no_config" / "config.json").unlink()
    shutil.rmtree(folder / "none" / "checkpoints")
    (folder / "fashion").mkdir()
    return folder


CASES: dict[str, tuple[list[str], str]] = {
    # arguments
    "command": (["trian"], "no command 'trian': did you mean 'train'"),
    "option": ([*TINY_TRAIN, "--optim.lrr", "1"], "--optim.lr"),
    "another router": (
        [*TINY_TRAIN, "--model.moe.router.kind", "expert_choice"],
        "('token_choice',). Another kind is named in the config file",
    ),
    "option of evaluate": ([*EVALUATE, "--bach-size", "1"], "--batch-size"),
    "no value": ([*TINY_TRAIN, "--steps"], "--steps"),
    "extra argument": ([*EVALUATE, "more"], "more"),
    "type": ([*TINY_TRAIN, "--steps", "many"], "--steps"),
    "choice": ([*TINY_TRAIN, "--model.pooling", "max"], "'class_token', 'mean', 'attention'"),
    "priority": ([*TINY_TRAIN, "--model.moe.router.priority", "bpr"], "'largest_gate'"),
    "on nan": ([*TINY_TRAIN, "--on-nan", "ignore"], "'stop', 'rewind'"),
    "steps to trace": (
        [*TINY_TRAIN, "--profile", "15:10"],
        "profile=15:10: give the first and the last step, from 1 to 200, such as 10:15 (--profile)",
    ),
    "no workdir": (["train", "--config", "{tiny}"], "--workdir"),
    "no checkpoint given": (["evaluate"], "--checkpoint"),
    # names
    "model": (["summary", "vmoe_s32_last2"], "no model 'vmoe_s32_last2': did you mean"),
    "no model given": (["summary"], "Name of a model, as listed by `vmoe models`"),
    "pattern": (["models", "resnet*"], "no model matches 'resnet*'"),
    "data set": ([*TINY_TRAIN, "--data.name", "digit"], "no data set 'digit': did you mean"),
    "split": ([*EVALUATE, "--data", "digits:tset"], "no split 'tset': did you mean 'test'"),
    # recipes
    "no recipe": ([*TRAIN, "gone.py"], "vmoe: gone.py: no such file"),
    "recipe is a folder": ([*TRAIN, "photos"], "vmoe: photos: no such file"),
    "syntax": ([*TRAIN, "syntax.py"], "syntax.py, line 1: '(' was never closed"),
    "import": ([*TRAIN, "import.py"], "import.py, line 1: No module named 'nothing_like_it'"),
    "key": (
        [*TRAIN, "key.py"],
        "key.py, line 2: TrainConfig has no field 'stepz': did you mean 'steps'",
    ),
    "type in a recipe": (
        [*TRAIN, "type.py"],
        "type.py, line 2: steps must be an int of 64 bits or None, not 'many'",
    ),
    "no config in it": ([*TRAIN, "nothing.py"], "must define `config = TrainConfig(...)`"),
    "recipe that raises": ([*TRAIN, "raises.py"], "raises.py, line 2: division by zero"),
    "recipe that exits": ([*TRAIN, "exits.py"], "exits.py, line 2: no disk"),
    "keyword": (
        [*TRAIN, "unknown_field.py"],
        "TrainConfig has no field 'modle': did you mean 'model'",
    ),
    "nested keyword": (
        [*TRAIN, "unknown_nested_field.py"],
        "line 2: ViTConfig has no field 'widht': did you mean 'width'",
    ),
    "truncated config": ([*TRAIN, "half.json"], "vmoe: half.json: TrainConfig"),
    "empty config path": ([*TRAIN, ""], "--config is empty"),
    "empty workdir": (["train", "--config", "{tiny}", "--workdir", ""], "--workdir is empty"),
    "binary recipe": ([*TRAIN, "bytes.py"], "bytes.py: source code"),
    "router": (
        [*TRAIN, "soft.py"],
        "soft.py, line 2: moe.router must be a TokenChoice",
    ),
    "decay": (
        [*TRAIN, "decay.py"],
        "line 2: optim.weight_decay must be a WeightDecayConfig, not 0.3",
    ),
    "data in a recipe": (
        [*TRAIN, "data.py"],
        "line 2: data must be a DataConfig, not 'digits'",
    ),
    "k in a recipe": (
        [*TRAIN, "router.py"],
        "line 2: moe.router.k=2 is more than moe.num_experts=1",
    ),
    "moe for each block": ([*TRAIN, "blocks.py"], "one for each of the 2 sparse blocks"),
    # invalid values and combinations
    "k": (
        [*TINY_TRAIN, "--model.moe.router.k", "5"],
        "k=5 is more than moe.num_experts=4: lower k",
    ),
    "capacity": ([*TINY_TRAIN, "--model.moe.capacity", "0"], "moe.capacity=0: an expert needs"),
    "dropless": ([*TRAIN, "dropless.py"], "line 2: moe.dropless with router expert_choice"),
    "implementation": ([*TINY_TRAIN, "--model.moe.implementation", "block"], "'blocked', 'ragged'"),
    "capacity factor": ([*TINY_TRAIN, "--model.moe.capacity-factor", "0"], "use more than 0"),
    "patch": (
        [*TINY_TRAIN, "--model.patch-size", "3"],
        "patch_size=3 does not divide model.image_size=8",
    ),
    "heads": (
        [*TINY_TRAIN, "--model.num-heads", "3"],
        "num_heads=3 does not divide model.width=16",
    ),
    "block": ([*TINY_TRAIN, "--model.sparse-blocks", "2"], "block numbers below depth=2"),
    "classes": ([*TINY_TRAIN, "--model.num-classes", "9"], "has 10 classes, model.num_classes=9"),
    "warmup": ([*TINY_TRAIN, "--steps", "10"], "optim.warmup_steps=20 must be less than steps=10"),
    "EMA": ([*TINY_TRAIN, "--ema-decay", "1.5"], "ema_decay=1.5: it must be in [0, 1)"),
    "smoothing": ([*TINY_TRAIN, "--label-smoothing", "1"], "label_smoothing=1.0: it must be"),
    "dropout": ([*TINY_TRAIN, "--model.dropout", "1"], "model.dropout=1.0: a dropout rate"),
    "learning rate": ([*TINY_TRAIN, "--optim.lr", "0"], "optim.lr=0.0: use more than 0"),
    "negative factor": (
        [*TINY_TRAIN, "--optim.lr-factors.head", "-1"],
        "optim.lr_factors.head=-1.0: use 0 or more",
    ),
    "layer decay": (
        [*TINY_TRAIN, "--optim.layer-decay", "0"],
        "optim.layer_decay=0.0: it must be in (0, 1]",
    ),
    "nothing to train": (
        [*TINY_TRAIN, *(f"--optim.lr-factors.{part}=0" for part in LR_FACTORS)],
        "optim.lr_factors: head, others, routers, experts are all 0, so there is nothing to train",
    ),
    "infinite learning rate": (
        [*TINY_TRAIN, "--optim.lr", "inf"],
        "optim.lr must be a finite number of float32, not inf (--optim.lr)",
    ),
    "seed": ([*TINY_TRAIN, "--seed", "4294967296"], "seed=4294967296: use 0 to 4294967295"),
    "zero image size of a set": (
        [*TINY_TRAIN, "--evaluations.0.image-size", "0"],
        "image_size=0: use at",
    ),
    "data of a set": (
        [*TINY_TRAIN, "--evaluations.0.data", "digits"],
        "evaluations.data=digits: give train, validation, test, or NAME:SPLIT",
    ),
    "split in the name": ([*TINY_TRAIN, "--data.name", "digits:tset"], "no split 'tset'"),
    "steps": ([*TINY_TRAIN, "--steps", "0"], "steps=0: use at least 1"),
    "steps of twenty digits": (
        [*TINY_TRAIN, "--steps", "9" * 20],
        "steps must be an int of 64 bits or None, not 99999999999999999999 (--steps)",
    ),
    "endless epochs": (
        [*TINY_TRAIN, "--epochs", "1e20"],
        "epochs=1e+20 is 3928125000000000000000 steps: a run has at most 2147483647 (--epochs)",
    ),
    "a learning rate that rises": (
        [*TINY_TRAIN, "--optim.lr", "2e-6"],
        "optim.end_lr=5e-05 is more than optim.lr=2e-06, so the learning rate would rise",
    ),
    "two lengths": (
        [*TINY_TRAIN, "--steps", "30", "--epochs", "2"],
        "steps=30 and epochs=2.0: a run has one length; set the others to None",
    ),
    "epochs shorter than the warmup": (
        [*TINY_TRAIN, "--epochs", "0.5"],
        "optim.warmup_steps=20 must be less than steps=20",
    ),
    "accumulate": (
        [*TINY_TRAIN, "--accumulate", "3"],
        "accumulate=3: the 32 images of each device cannot be cut into that many equal parts; use",
    ),
    "a setting of another optimiser": (
        [*TINY_TRAIN, "--optim.momentum", "0.5"],
        "optim.momentum=0.5 has no effect with optim.kind=adamw, only with sgd or adafactor",
    ),
    "batch": ([*TINY_TRAIN, "--batch-size", "2000"], "batch_size=2000 is more than the 1257"),
    "shift": ([*TINY_TRAIN, "--data.shift", "8"], "data.shift=8 must be less than model"),
    "implementation of soft slots": ([*TRAIN, "soft_rows.py"], "a soft router fills every slot"),
    "capacity of soft slots": ([*TRAIN, "soft_set.py"], "the slots of a soft router are parame"),
    "overrides of a dense model": (
        [*TRAIN, "dense_set.py"],
        "evaluations, set 'one': routing.k=1: no block of this model is sparse",
    ),
    "size of a set": (
        [*TINY_TRAIN, "--evaluations.0.image-size", "9"],
        "model.patch_size=4 does not",
    ),
    "k of a set": ([*TINY_TRAIN, "--evaluations.0.routing.k", "5"], "moe.router.k=5 is more than"),
    # data
    "no folder": ([*TINY_TRAIN, "--data.name", "folder:gone"], "folder:gone: no such folder"),
    "no path": ([*TINY_TRAIN, "--data.name", "folder"], "data set 'folder' needs a path"),
    "empty class": ([*TINY_TRAIN, "--data.name", "folder:photos"], "photos/emu: no images in it"),
    "few images": ([*TINY_TRAIN, "--data.name", "folder:sparse"], "class 'cat' has 2 images"),
    "no classes": ([*TINY_TRAIN, "--data.name", "folder:empty"], "no sub-folders"),
    "no labels": (
        [*TINY_TRAIN, "--data.name", "manifest:unlabelled.csv", "--batch-size", "2"],
        "manifest:unlabelled.csv:train: no image has a label: use data with labels",
    ),
    "no labels to evaluate": (
        [*TINY_TRAIN, "--data.name", "manifest:unlabelled_set.csv", "--batch-size", "2"],
        "manifest:unlabelled_set.csv:validation: no image has a label",
    ),
    "broken image": (
        [*TINY_TRAIN, "--data.name", "folder:broken", "--batch-size", "20"],
        "12 of 24 images cannot be read: broken/cat/0.png (truncated: its end is missing)",
    ),
    "no arrays": ([*TINY_TRAIN, "--data.name", "arrays:gone.npz"], "gone.npz: no such file"),
    "truncated arrays": ([*TINY_TRAIN, "--data.name", "arrays:half.npz"], "not a complete .npz"),
    "float arrays": ([*TINY_TRAIN, "--data.name", "arrays:float.npz"], "uint8 (b, h, w, 3) or"),
    "no Fashion-MNIST": (
        [*TINY_TRAIN, "--data.name", "fashion_mnist:fashion"],
        "fashion/train-images-idx3-ubyte.gz: no such file",
    ),
    "few images to evaluate": ([*EVALUATE, "--data", "folder:sparse:train"], "class 'cat' has 2"),
    "unknown class to evaluate": (
        [*EVALUATE, "--data", "folder:whole:train"],
        "has a class that the model was not trained on, 'cat'",
    ),
    # run folders
    "another config": (
        ["train", "--config", "{tiny}", "--workdir", "{run}", "--steps", "60", "--seed", "5"],
        "holds a run of another config (seed is 0 there and 5 here)",
    ),
    "workdir is a file": (
        ["train", "--config", "{tiny}", "--workdir", "no.png"],
        "workdir no.png: File exists",
    ),
    "workdir below a file": (
        ["train", "--config", "{tiny}", "--workdir", "no.png/run"],
        "workdir no.png/run: Not a directory",
    ),
    "checkpoints without a config": (
        ["train", "--config", "{tiny}", "--workdir", "no_config"],
        "no_config: it has checkpoints but no config.json",
    ),
    "not a run": (
        ["evaluate", "--checkpoint", "photos"],
        "photos: no checkpoint of a known format; give a run folder",
    ),
    "missing run": (
        ["evaluate", "--checkpoint", "gone"],
        "gone: no such file or folder; give a run folder",
    ),
    "no checkpoint": (["evaluate", "--checkpoint", "none"], "none: no checkpoint yet"),
    "no such step": (
        ["evaluate", "--checkpoint", "{run}/checkpoints/7"],
        "no such checkpoint; choose from 60, last, best",
    ),
    "truncated config.json": (["evaluate", "--checkpoint", "words"], "words/config.json: Train"),
    "unknown field in config.json": (
        ["evaluate", "--checkpoint", "field"],
        "field/config.json: TrainConfig stepz",
    ),
    "no class names": (
        ["evaluate", "--checkpoint", "names"],
        "classes.json is missing from run folder names; restore it",
    ),
    # evaluation and prediction
    "dropless with a capacity factor": (
        [*EVALUATE, "--routing.dropless", "True", "--routing.capacity-factor", "4"],
        "routing.capacity_factor=4.0 with routing.dropless, which has no capacity",
    ),
    "capacity with a capacity factor": (
        [*EVALUATE, "--routing.capacity", "4", "--routing.capacity-factor", "4"],
        "routing.capacity_factor=4.0 with routing.capacity=4, which overrides it",
    ),
    "k of an evaluation": ([*EVALUATE, "--routing.k", "5"], "k=5 is more than moe.num_experts=4"),
    "priority of an evaluation": ([*EVALUATE, "--routing.priority", "bpr"], "largest_gate"),
    "width": ([*EVALUATE, "--model.width", "32"], "--model.width"),
    "image size of the model": ([*EVALUATE, "--model.image-size", "16"], "--image-size"),
    "batch of 0 images": ([*EVALUATE, "--batch-size", "0"], "batch_size=0: use at least 1"),
    "indivisible image size": (
        [*EVALUATE, "--image-size", "9"],
        "images of 9 x 9 pixels: patches of 4 do not",
    ),
    "csv with other columns": (
        [*EVALUATE, "--csv", "rows.csv"],
        "vmoe: rows.csv: it has other columns",
    ),
    "no folder for csv": ([*EVALUATE, "--csv", "gone/rows.csv"], "no folder gone"),
    "no folder for predictions": (
        [*EVALUATE, "--predictions", "gone/p.csv"],
        "predictions=gone/p.csv: no folder gone; make it first (--predictions)",
    ),
    "zero image size": ([*EVALUATE, "--image-size", "0"], "image_size=0: use at least 1"),
    "several data sets": ([*EVALUATE, "--data", "digits", "emoji_sample"], "several need fewshot"),
    "shots": ([*EVALUATE, "--fewshot", "1,x"], "fewshot=1,x: give numbers of images per class"),
    "no shots": ([*EVALUATE, "--fewshot", "0"], "fewshot.shots=(0,): give at least one number"),
    # options without an effect
    "classes of a probe": (
        [*EVALUATE, "--fewshot", "1", "--per-class"],
        "vmoe: --per-class has no effect with --fewshot: leave it out",
    ),
    "seed of no probe": (
        [*EVALUATE, "--fewshot-seed", "7"],
        "vmoe: --fewshot-seed 7 has no effect without --fewshot: give both or neither",
    ),
    "preprocessing of no probe": (
        [*EVALUATE, "--fewshot-preprocessing", "paper"],
        "vmoe: --fewshot-preprocessing paper has no effect without --fewshot: give both or neither",
    ),
    "new head of no other model": (
        [*TINY_TRAIN, "--init-new-head"],
        "vmoe: --init-new-head has no effect without --init",
    ),
    "rewinds of a run that stops": (
        [*TINY_TRAIN, "--max-rewinds", "7"],
        "vmoe: --max-rewinds 7 has no effect without --on-nan rewind",
    ),
    "removals without a page": (
        ["routing", "--checkpoint", "{run}", "--no-removals"],
        "vmoe: --no-removals has no effect without --out",
    ),
    "shards of a folder": (
        ["convert", "{run}", "new", "--shards", "2"],
        "vmoe: --shards 2 has no effect without --format published",
    ),
    "groups of a program": (
        ["convert", "{run}", "new", "--format", "jax", "--routing.images-per-group", "2"],
        "vmoe: --routing.images-per-group 2 has no effect with --format jax: leave it out",
    ),
    "seed of a rule": (
        ["prune", "{run}", "new", "--num_experts", "2", "--seed", "5"],
        "vmoe: --seed 5 has no effect without --rule random",
    ),
    "predictions are a pipe": (
        [*EVALUATE, "--predictions", "pipe"],
        "predictions=pipe: it is not a file; give a file (--predictions)",
    ),
    "predictions are a folder": (
        [*EVALUATE, "--predictions", "photos"],
        "predictions=photos: it is not a file; give a file (--predictions)",
    ),
    "csv is a folder": ([*EVALUATE, "--csv", "photos"], "vmoe: photos: Is a directory"),
    "no image": ([*PREDICT, "gone.png"], "gone.png: no such file or folder"),
    "not an image": ([*PREDICT, "no.png"], "no.png: not an image"),
    "truncated image": ([*PREDICT, "half.png"], "half.png: cannot be read as an image"),
    "empty image path": ([*PREDICT, ""], "an image argument is empty"),
    "folder without images": ([*PREDICT, "empty"], "empty: no images there"),
    "no images to predict": (PREDICT, "no images given: name at least one file"),
    "top 0": ([*PREDICT, "photos", "--top", "0"], "top=0: use at least 1"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CASES.values(), ids=CASES.keys())
def test_wrong_input_prints_one_clear_line_and_writes_nothing(
    arguments: list[str], message: str, tiny_run: Path, files: Path
) -> None:
    before = [sorted(folder.rglob("*")) for folder in (files, tiny_run)]
    result = vmoe(*(argument.format(run=tiny_run, tiny=TINY) for argument in arguments), cwd=files)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("vmoe: ") and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
    assert not result.stdout
    assert [sorted(folder.rglob("*")) for folder in (files, tiny_run)] == before


def test_a_wrong_option_is_one_line_of_words_where_boxes_cannot_be_printed() -> None:
    arguments = ("train", "--config", TINY, "--workdir", "new", "--steps", "many")
    result = vmoe(*arguments, environment={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("vmoe: Error parsing --steps: ")
    assert "---" not in result.stderr and "helptext" not in result.stderr


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_config,
    "classes.json": read_class_names,
    "environment.json": read_environment,
    "init.json": read_init,
    "inference.json": lambda workdir: read_inference(workdir / "inference.json"),
    "checkpoints/metrics.json": read_metrics,
    "wandb.json": lambda workdir: check_wandb(workdir, ""),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("content", ["[" * 200_000, "null", None], ids=["deep", "null", "folder"])
def test_a_json_file_of_a_run_that_is_none_is_named_in_one_line(
    content: str | None, name: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.mkdir() if content is None else path.write_text(content)
    with pytest.raises(VmoeError, match=f"^{re.escape(str(path))}.{{,200}}$"):
        READERS[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_a_json_file_of_a_run_that_cannot_be_read_now_is_no_wrong_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first byte of a process's memory is not there: reading it is an input/output error."""
    monkeypatch.setattr(retry, "PAUSES", (0,))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to("/proc/self/mem")
    with pytest.raises(Failure, match=rf"^{re.escape(str(path))}: cannot be read .*Input/output"):
        READERS[name](tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_a_json_file_of_a_run_that_cannot_be_read_for_a_moment_is_read_again(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("null")  # which is refused once it is read
    with no_more_files(0.05), pytest.raises(VmoeError) as caught:
        READERS[name](tmp_path)
    assert "Too many open files" not in str(caught.value)


def test_a_truncated_checkpoint_is_reported_with_exit_status_1(files: Path) -> None:
    result = vmoe("evaluate", "--checkpoint", files / "cut")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "checkpoint 60 is corrupt (" in result.stderr
    assert "no intact checkpoint" in result.stderr.splitlines()[-1]


def garble(image: Path) -> None:
    """Changes bytes between the first and the last ones, which a check of headers does not read."""
    content = bytearray(image.read_bytes())
    content[60:400] = bytes([255]) * 340
    image.write_bytes(content)


def test_a_corrupt_image_in_training_is_reported_and_a_checkpoint_is_saved(
    tmp_path: Path,
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(300):
            pixels = np.random.default_rng(i).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{i}.png")
    train = tmp_path / "photos"
    arguments = ["train", "--config", TINY, "--workdir", tmp_path / "new", "--log-every", "1"]
    arguments += ["--data.name", f"folder:{train}", "--model.num-classes", "2"]
    broken = train / open_source(f"folder:{train}", "train").path(7)
    garble(broken)
    result = vmoe(*arguments)
    *lines, last = result.stderr.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert result.returncode == 2 and f"{broken}: cannot be read as an image" in last
    assert "Traceback" not in result.stderr
    saved = steps_of(tmp_path / "new")
    assert saved == [len(steps)] and saved[0] > 0


@pytest.mark.skipif(
    os.geteuid() == 0 and not shutil.which("setpriv"),
    reason="root ignores permissions, and setpriv is not installed to change that",
)
def test_a_path_without_permission_is_reported(files: Path, tiny_run: Path, tmp_path: Path) -> None:
    shutil.copy(files / "photos" / "cat" / "0.png", tmp_path / "locked.png")
    (tmp_path / "locked.png").chmod(0)
    (tmp_path / "locked").mkdir(mode=0o500)
    shutil.copytree(files / "sparse", tmp_path / "photos")
    (tmp_path / "photos" / "cat").chmod(0)
    setpriv = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
    under = setpriv if os.geteuid() == 0 else ()
    for arguments, message in [
        (["predict", "--checkpoint", tiny_run, tmp_path / "locked.png"], "Permission denied"),
        (
            ["predict", "--checkpoint", tiny_run, tmp_path / "photos"],
            "photos/cat: Permission denied",
        ),
        (
            ["train", "--config", TINY, "--workdir", tmp_path / "locked" / "run"],
            "Permission denied",
        ),
        (
            [
                *("train", "--config", TINY, "--workdir", tmp_path / "new"),
                *("--data.name", f"folder:{tmp_path / 'photos'}"),
            ],
            "photos/cat: Permission denied",
        ),
    ]:
        result = interpreter(*arguments, under=under)
        assert (
            result.returncode == 2 and result.stderr.count("\n") == 1 and message in result.stderr
        )


def test_a_corrupt_image_in_an_evaluation_is_reported_and_the_checkpoint_is_kept(
    files: Path, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        shutil.copytree(files / "photos", tmp_path / "photos" / split)
        (tmp_path / "photos" / split / "emu").rmdir()
    broken = tmp_path / "photos" / "validation" / "dog" / "3.png"
    garble(broken)
    arguments = ["train", "--config", TINY, "--workdir", tmp_path / "new", "--batch-size", "8"]
    arguments += ["--data.name", f"folder:{tmp_path / 'photos'}", "--steps", "40"]
    result = vmoe(*arguments, "--evaluate-every", "30", "--checkpoint-every", "30")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{broken}: cannot be read as an image" in result.stderr.splitlines()[-1]
    assert steps_of(tmp_path / "new") == [30]


def test_debug_prints_the_traceback() -> None:
    result = vmoe("--debug", "summary", "vmoe_s32")
    assert result.returncode == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("vmoe: no model 'vmoe_s32'")
