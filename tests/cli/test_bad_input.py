"""Wrong input: one clear line that names the field and its value, status 2, and nothing written.

What a config refuses is tested without a command. ``CASES`` are commands, those of ``REAL`` also in
processes of their own. In these ``{run}`` is a trained run, ``{tiny}`` its config file; they run in
``files``.
"""

import ast
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.command import ROOT, TINY, forked, interpreter, vmoe
from tests.data.open_files import no_more_files
from vmoe.checkpoints.restore import read_metrics
from vmoe.cli.arguments import options_of
from vmoe.config import (
    CnnExpert,
    EvalConfig,
    Exchange,
    FewShotConfig,
    LrFactorsConfig,
    MoEConfig,
    Preprocessing,
    RoutingOverrides,
    load,
    replace,
)
from vmoe.data.sources import SPLITS, open_source
from vmoe.errors import Failure, UsageError, VmoeError
from vmoe.host import retry
from vmoe.studies.attack.config import AttackConfig, MatesConfig
from vmoe.train.wandb_run import check_wandb
from vmoe.workdir.layout import (
    read_class_names,
    read_config,
    read_environment,
    read_init,
    steps_of,
)
from vmoe.workdir.routing_file import read_routing_file

RECIPE = "from vmoe.config import *\nconfig = replace(TrainConfig(), {})\n"
TRAIN = ["train", "--workdir", "new", "--config"]
TINY_TRAIN = [*TRAIN, "{tiny}"]
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
            "model=dict(moe=MoEConfig(router=Soft(), experts=MlpExpert(implementation='ragged')))"
        ),
        "soft_set.py": RECIPE.format(
            "model=dict(sparse_blocks=(1,), moe=MoEConfig(router=Soft())), "
            "evaluations=(EvalConfig(routing=RoutingOverrides(capacity_factor=4.0)),)"
        ),
        "dropout.py": RECIPE.format("model=dict(moe=dict(experts=CnnExpert(dropout=0.1)))"),
        "decay.py": RECIPE.format("optim=dict(weight_decay=0.3)"),
        "data.py": RECIPE.format("data='digits'"),
        "no.png": "not an image",
        "rows.csv": "other,columns\n",
        "unlabeled.csv": "path,label\n" + "".join(f"photos/cat/{i}.png,\n" for i in range(12)),
        "unlabeled_set.csv": "path,label,split\n"
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
    for split in ("train", "validation"):
        shutil.copytree(folder / "sparse", folder / "halves" / split)
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
    shutil.copy(folder / "photos" / "cat" / "0.png", folder / "locked.png")
    shutil.copytree(folder / "sparse", folder / "locked")
    for path in (folder / "locked.png", folder / "locked" / "cat"):
        path.chmod(0)
    (folder / "locked" / "dog").chmod(0o500)
    return folder


CASES: dict[str, tuple[list[str], str]] = {
    # arguments
    "command": (["trian"], "no command 'trian': did you mean 'train'"),
    "option": ([*TINY_TRAIN, "--optim.lrr", "1"], "--optim.lr"),
    "choice": ([*TINY_TRAIN, "--model.pooling", "max"], "'class_token', 'mean', 'attention'"),
    "steps to trace": (
        [*TINY_TRAIN, "--profile", "15:10"],
        "profile=15:10: give the first and the last step, from 1 to 200, such as 10:15 (--profile)",
    ),
    # names
    "no model given": (["summary"], "Name of a model, as listed by `vmoe models`"),
    "pattern": (["models", "resnet*"], "no model matches 'resnet*'"),
    "data set": ([*TINY_TRAIN, "--data.name", "digit"], "no data set 'digit': did you mean"),
    "folder as a data set": ([*TINY_TRAIN, "--data.name", "{run}"], "of this folder, use folder:"),
    "split": ([*EVALUATE, "--data", "digits:tset"], "no split 'tset': did you mean 'test'"),
    # recipes
    "no recipe": ([*TRAIN, "gone.py"], "vmoe: gone.py: no such file"),
    "no such config": ([*TRAIN, "digit"], "no file and no config 'digit': did you mean 'digits'?"),
    "key": (
        [*TRAIN, "key.py"],
        "key.py, line 2: TrainConfig has no field 'stepz': did you mean 'steps'",
    ),
    "recipe that exits": ([*TRAIN, "exits.py"], "exits.py, line 2: no disk"),
    "empty workdir": (["train", "--config", "{tiny}", "--workdir", ""], "--workdir is empty"),
    # invalid values and combinations
    "k": (
        [*TINY_TRAIN, "--model.moe.router.k", "5"],
        "model.moe.router.k=5 with model.moe.num_experts=4: lower k or add experts (--",
    ),
    "hot experts": (
        [*TINY_TRAIN, "--model.moe.exchange.hot-experts", "5", "--model.moe.router.dropless"],
        "model.moe.exchange.hot_experts=5: use at most 4 (--model.moe.exchange.hot-experts)",
    ),
    "classes": ([*TINY_TRAIN, "--model.num-classes", "9"], "model.num_classes=9: digits:train has"),
    "learning rate": (
        [*TINY_TRAIN, "--optim.lr", "0"],
        "vmoe: optim.lr=0.0: use more than 0 (--optim.lr)",
    ),
    "data of a set": (
        [*TINY_TRAIN, "--evaluations.0.data", "digits"],
        "data=digits: give train, validation, test, or NAME:SPLIT of another data set (--",
    ),
    "a learning rate that rises": (
        [*TINY_TRAIN, "--optim.lr", "2e-6"],
        "optim.end_lr=5e-05 with optim.lr=2e-06: the learning rate would rise",
    ),
    "accumulate": (
        [*TINY_TRAIN, "--accumulate", "3"],
        "accumulate=3: the 32 images of each device cannot be cut into that many equal parts; use",
    ),
    "batch": ([*TINY_TRAIN, "--batch-size", "2000"], "batch_size=2000: more than the 1257"),
    # data
    "no folder": ([*TINY_TRAIN, "--data.name", "folder:gone"], "folder:gone: no such folder"),
    "no path": ([*TINY_TRAIN, "--data.name", "folder"], "data set 'folder' needs a path"),
    "empty class": ([*TINY_TRAIN, "--data.name", "folder:photos"], "photos/emu: no images in it"),
    "few images": ([*TINY_TRAIN, "--data.name", "folder:sparse"], "class 'cat' has 2 images"),
    "no classes": ([*TINY_TRAIN, "--data.name", "folder:empty"], "no sub-folders"),
    "no labels": (
        [*TINY_TRAIN, "--data.name", "manifest:unlabeled.csv", "--batch-size", "2"],
        "manifest:unlabeled.csv:train: no image has a label: use data with labels",
    ),
    "no labels to evaluate": (
        [*TINY_TRAIN, "--data.name", "manifest:unlabeled_set.csv", "--batch-size", "2"],
        "manifest:unlabeled_set.csv:validation: no image has a label",
    ),
    "broken image": (
        [*TINY_TRAIN, "--data.name", "folder:broken", "--batch-size", "20"],
        "12 of 24 images cannot be read: broken/cat/0.png (truncated: its end is missing)",
    ),
    "broken image to skip": (
        [*TINY_TRAIN, "--data.name", "folder:broken", "--batch-size", "20"],
        "a run with data.on_error=replace uses other images instead (--data.on-error replace)\n",
    ),
    "broken image to evaluate": (
        [*EVALUATE, "--data", "folder:broken:train"],
        "a run with data.on_error=replace uses other images instead\n",
    ),
    "another architecture to start from": (
        [*TINY_TRAIN, "--init", "{run}", "--model.depth", "2"],
        "parameters from the weights (--init, --init-partial)",
    ),
    "another GELU to start from": (
        [*TINY_TRAIN, "--init", "{run}", "--model.activation", "gelu"],
        "the parameters were trained with model.activation=gelu_tanh; use that "
        "(--init, --model.activation gelu_tanh)",
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
    # permissions
    "locked image": ([*PREDICT, "locked.png"], "Permission denied"),
    "locked folder of images": ([*PREDICT, "locked"], "locked/cat: Permission denied"),
    "locked class": (
        [*TINY_TRAIN, "--data.name", "folder:locked"],
        "locked/cat: Permission denied",
    ),
    "locked workdir": (
        ["train", "--config", "{tiny}", "--workdir", "locked/dog/run"],
        "Permission denied",
    ),
    # run folders
    "another config": (
        ["train", "--config", "{tiny}", "--workdir", "{run}", "--steps", "60", "--seed", "5"],
        "(seed is 0 there and 5 here): use the config of that run, or another workdir (--workdir)",
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
        "so its run is unknown: restore config.json, or use another workdir (--workdir)",
    ),
    "not a run": (
        ["evaluate", "--checkpoint", "photos"],
        "photos: no checkpoint of a known format; give a run folder",
    ),
    "missing run": (
        ["evaluate", "--checkpoint", "gone"],
        "gone: no such file, folder or model; give a run folder",
    ),
    "misspelt model": (
        ["evaluate", "--checkpoint", "vmoe_emojii"],
        "vmoe_emojii: no such file, folder or model; did you mean 'vmoe_emoji'?",
    ),
    "a model of timm": (
        [*PREDICT[:1], "--checkpoint", "vit_base_patch16_224", "photos"],
        "vit_base_patch16_224: no such file, folder or model; for timm's weights give "
        "hf://timm/vit_base_patch16_224 (its shape is that of vit_b16); `vmoe models` lists",
    ),
    "models of timm": (["models", "vit_small_*_patch16*"], "`vmoe models` lists all"),
    "a model of the hub": (
        ["models", "--pretrained", "google/vit-base-patch16-224"],
        "for a model of the Hugging Face hub give hf://google/vit-base-patch16-224; `vmoe models`",
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
    "k of an evaluation": ([*EVALUATE, "--routing.k", "5"], "k=5 with model.moe.num_experts=4"),
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
    "no data": (["evaluate", "--checkpoint", "vmoe_emoji"], "training data; name some (--data N"),
    "no data of a study": (["routing", "--checkpoint", "vmoe_emoji"], "name some (--data NAME)"),
    "no test split": (
        [*EVALUATE, "--data", "folder:halves"],
        "it has train, validation: use folder:halves:validation (--data folder:halves:validation)",
    ),
    "no validation split": (
        ["prune", "vmoe_emoji", "new", "--num-experts", "4", "--data", "emoji_sample"],
        "it has test: use emoji_sample:test (--data emoji_sample:test)",
    ),
    "named split": (
        [*EVALUATE, "--data", "folder:halves:test"],
        "halves has no split 'test': choose from train, validation\n",
    ),
    "no training split for a probe": (
        ["probe", "--checkpoint", "vmoe_emoji", "--data", "emoji_sample", "--shots", "1"],
        "name them as NAME:TRAIN,TEST (--data NAME:TRAIN,TEST)",
    ),
    "several data sets": (
        [*EVALUATE, "--data", "digits", "emoji_sample"],
        "Unrecognized options: emoji_sample",
    ),
    "shots": (["probe", *EVALUATE[1:], "--shots", "1", "x"], "--shots"),
    "no shots": (["probe", *EVALUATE[1:], "--shots"], "shots=(): give at least one (--shots)"),
    "no epsilon": (["attack", *EVALUATE[1:], "--epsilon"], "epsilon=(): give at least one"),
    # options that have become a command
    "probe": (
        [*EVALUATE, "--fewshot=1,5", "--fewshot-seed", "1"],
        "vmoe: --fewshot of vmoe evaluate is a command now: vmoe probe (vmoe probe --help lists",
    ),
    "settings of a probe": ([*EVALUATE, "--fewshot_l2", "train"], "a command now: vmoe probe ("),
    "mates": (
        ["attack", *EVALUATE[1:], "--target", "mates"],
        "vmoe: --target of vmoe attack is a command now: vmoe mates (vmoe mates --help lists",
    ),
    "settings of mates": (
        ["attack", *EVALUATE[1:], "--mates.victims", "9"],
        "--mates of vmoe attack is a command now: vmoe mates (",
    ),
    # options without an effect
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
    "folder without images": ([*PREDICT, "empty"], "empty: no images there"),
    "no images to predict": (PREDICT, "no images given: name at least one file"),
    "top 0": ([*PREDICT, "photos", "--top", "0"], "vmoe: top=0: use at least 1 (--top)"),
    "groups of a prediction": (
        [*PREDICT, "photos", "--routing.images-per-group", "4"],
        "each image is a group of its own; vmoe evaluate uses larger groups (--routing.images-p",
    ),
    "indivisible size of a prediction": (
        [*PREDICT, "photos", "--image-size", "9"],
        "images of 9 x 9 pixels: patches of 4 do not",
    ),
    # other commands
    "budget": (
        ["capacity", "--checkpoint", "{run}", "--budget", "2x"],
        "vmoe: budget=2x: use a fraction",
    ),
    "steps of an attack": (
        ["attack", "--checkpoint", "{run}", "--steps", "0"],
        "vmoe: attack.steps=0: use at least 1 (--steps)",
    ),
    "no folder for a page": (
        ["routing", "--checkpoint", "{run}", "--out", "gone/page.html"],
        "vmoe: out=gone/page.html: no folder gone; make it first (--out)",
    ),
    "no weights": (["inspect", "gone"], "vmoe: gone: no such file, folder or model"),
    "blocks": (
        ["upcycle", "{run}", "new", "--blocks", "last9"],
        "vmoe: blocks=last9: the only block is block 0: use 0 (--blocks)",
    ),
    "noise without its start": (
        ["upcycle", "{run}", "new", "--noise-std", "0.1"],
        "vmoe: --noise-std 0.1 has no effect without --start noise: give both or neither",
    ),
    "rank": (
        ["upcycle", "{run}", "new", "--start", "low_rank", "--rank", "0"],
        "vmoe: rank=0: use at least 1 (--rank)",
    ),
    "shards": (
        ["convert", "{run}", "new", "--format", "published", "--shards", "0"],
        "vmoe: shards=0: use at least 1 (--shards)",
    ),
    "config of nothing": (["config", "--config", "gone.py"], "vmoe: gone.py: no such file"),
    "devices": (
        ["plan", "--config", "{tiny}", "--devices", "0"],
        "vmoe: devices=0: use at least 1 (--devices)",
    ),
    "heads of a named model": (
        ["summary", "vit_s32", "--num-heads", "5"],
        "vmoe: model.num_heads=5 with model.width=512: use a divisor of the width (--",
    ),
    # arguments
    "option of evaluate": ([*EVALUATE, "--bach-size", "1"], "--batch-size"),
    "no value": ([*TINY_TRAIN, "--steps"], "--steps"),
    "extra argument": ([*EVALUATE, "more"], "more"),
    "choice of a field": ([*TINY_TRAIN, "--model.moe.router.priority", "bpr"], "'largest_gate'"),
    "on nan": ([*TINY_TRAIN, "--on-nan", "ignore"], "'stop', 'rewind'"),
    "choice of an override": ([*EVALUATE, "--routing.priority", "bpr"], "largest_gate"),
    "implementation": (
        [*TINY_TRAIN, "--model.moe.experts.implementation", "block"], "'blocked', 'ragged'"
    ),
    "field of the config": ([*EVALUATE, "--model.width", "32"], "--model.width"),
    "image size of the config": ([*EVALUATE, "--model.image-size", "16"], "--image-size"),
    "no workdir": (["train", "--config", "{tiny}"], "missing required option: --workdir ("),
    "nothing given": (["train"], "missing required options: --config, --workdir (vmoe train"),
    "no checkpoint given": (["evaluate"], "missing required option: --checkpoint"),
    "empty config": ([*TRAIN, ""], "--config is empty"),
    "empty image": ([*PREDICT, ""], "an image argument is empty"),
    "model": (["summary", "vmoe_s32_last2"], "no model 'vmoe_s32_last2': did you mean"),
    # a field in several options
    "set": (
        [*TINY_TRAIN, "--seed", "1", "--batch_size=8", "--evaluations.0.batch-size", "0"],
        "vmoe: evaluations.batch_size=0: use at least 1 (--evaluations.0.batch-size)",
    ),
    "the other field": (
        [*TINY_TRAIN, "--steps", "10"],
        "optim.warmup_steps=20 with steps=10: use optim.warmup_steps of at most 9, or more steps",
    ),
    "lengths": (
        [*TINY_TRAIN, "--steps", "30", "--epochs", "2"],
        "steps=30 with epochs=2.0: a run has one length; set the others to None (--epochs, --",
    ),
    "infinite learning rate": (
        [*TINY_TRAIN, "--optim.lr", "inf"],
        "vmoe: optim.lr=inf: use a finite number of float32 (--optim.lr)",
    ),
    "steps of twenty digits": (
        [*TINY_TRAIN, "--steps", "9" * 20],
        "steps=99999999999999999999: use an int of 64 bits or None (--steps)",
    ),
    "switched off": (
        [*TINY_TRAIN, "--data.preprocessing.no-exif", "--evaluations.0.image-size", "9"],
        "evaluations.image_size=9 with model.patch_size=4: use a multiple of the patch size (--",
    ),
    # recipes
    "folder": ([*TRAIN, "photos"], "vmoe: no file and no config 'photos': choose from cifar10"),
    "syntax": ([*TRAIN, "syntax.py"], "syntax.py, line 1: '(' was never closed"),
    "import": ([*TRAIN, "import.py"], "import.py, line 1: No module named 'nothing_like_it'"),
    "type": (
        [*TRAIN, "type.py"],
        "type.py, line 2: steps=many: use an int of 64 bits or None, not str",
    ),
    "no config": ([*TRAIN, "nothing.py"], "must define `config = TrainConfig(...)`"),
    "raises": ([*TRAIN, "raises.py"], "raises.py, line 2: division by zero"),
    "keyword": (
        [*TRAIN, "unknown_field.py"],
        "TrainConfig has no field 'modle': did you mean 'model'",
    ),
    "nested keyword": (
        [*TRAIN, "unknown_nested_field.py"],
        "line 2: ViTConfig has no field 'widht': did you mean 'width'",
    ),
    "truncated": ([*TRAIN, "half.json"], "vmoe: half.json: TrainConfig"),
    "binary": ([*TRAIN, "bytes.py"], "bytes.py: source code"),
    "router": (
        [*TRAIN, "soft.py"],
        "soft.py, line 2: model.moe.router=soft: use an AnyRouter such as TokenChoice",
    ),
    "decay": (
        [*TRAIN, "decay.py"],
        "line 2: optim.weight_decay=0.3: use a WeightDecayConfig",
    ),
    "data": ([*TRAIN, "data.py"], "line 2: data=digits: use a DataConfig, not str"),
    "k in a recipe": (
        [*TRAIN, "router.py", "--model.moe.router.k", "1"],
        "line 2: model.moe.router.k=2 with model.moe.num_experts=1: lower k or add experts\n",
    ),
    "moe for each block": ([*TRAIN, "blocks.py"], "one for each of the 2 sparse blocks"),
    "dropout of experts without": (
        [*TRAIN, "dropout.py"],
        "line 2: CnnExpert has no field 'dropout'",
    ),
    "implementation of soft slots": ([*TRAIN, "soft_rows.py"], "a soft router fills every slot"),
    "capacity of soft slots": ([*TRAIN, "soft_set.py"], "the slots of a soft router are parame"),
    "overrides of a dense model": (
        [*TRAIN, "dense_set.py"],
        "evaluations, set 'one': routing.k=1: no block of this model is sparse",
    ),
    # options without an effect
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
}  # fmt: skip
OUT_OF_MEMORY = [*EVALUATE, "--batch-size", f"{10**11}"]
REAL = {  # also in processes of their own: at least one of every command and every kind of mistake
    "command", "option", "no model given", "pattern", "steps to trace", "data set", "key",
    "accumulate", "broken image", "another config", "no such step", "batch of 0 images",
    "csv with other columns", "predictions are a pipe", "truncated image", "seed of a rule",
    "budget", "steps of an attack", "no folder for a page", "no weights", "blocks", "shards",
    "config of nothing", "devices", "heads of a named model",
}  # fmt: skip
LOCKED = [name for name in CASES if name.startswith("locked")]


def words_of(name: str, run: Path) -> list[str]:
    return [word.format(run=run, tiny=TINY) for word in CASES[name][0]]


@pytest.mark.parametrize("name", [name for name in CASES if name not in LOCKED])
def test_wrong_input_prints_one_clear_line_and_writes_nothing(
    name: str, tiny_run: Path, files: Path
) -> None:
    refused(name, vmoe, tiny_run, files)


@pytest.mark.process
@pytest.mark.parametrize("name", sorted(REAL))
def test_wrong_input_is_the_exit_status_of_a_command(
    name: str, tiny_run: Path, files: Path
) -> None:
    refused(name, forked, tiny_run, files)


def refused(
    name: str, command: Callable[..., CompletedProcess[str]], tiny_run: Path, files: Path
) -> None:
    """Checks a case."""
    before = [sorted(folder.rglob("*")) for folder in (files, tiny_run)]
    result = command(*words_of(name, tiny_run), cwd=files)
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("vmoe: ") and result.stderr.count("\n") == 1, result.stderr
    assert CASES[name][1] in result.stderr
    assert not result.stdout
    assert [sorted(folder.rglob("*")) for folder in (files, tiny_run)] == before


# Root may read everything, unless a command takes that from it.
SETPRIV = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")


ONE_BY_ONE = """
import json, sys
from tests.command import vmoe
for line in sys.stdin:
    words, cwd = json.loads(line)
    result = vmoe(*words, cwd=cwd)
    print(json.dumps([result.returncode, result.stdout, result.stderr]), flush=True)
"""


@pytest.mark.process
def test_what_its_user_may_not_open_is_named(tiny_run: Path, files: Path) -> None:
    """One process without these rights runs all commands."""
    under = SETPRIV if os.geteuid() == 0 else ()
    if under and not shutil.which("setpriv"):
        pytest.skip("root ignores permissions, and setpriv is not installed to change that")
    line = [*under, sys.executable, "-c", ONE_BY_ONE]
    pipe = subprocess.PIPE
    with subprocess.Popen(line, stdin=pipe, stdout=pipe, text=True, cwd=ROOT) as process:

        def command(*words: str, cwd: Path) -> CompletedProcess[str]:
            print(json.dumps([words, str(cwd)]), file=process.stdin, flush=True)
            return CompletedProcess(words, *json.loads(process.stdout.readline()))

        for name in LOCKED:
            refused(name, command, tiny_run, files)


def test_out_of_memory_names_the_option_of_an_evaluation_that_helps(tiny_run: Path) -> None:
    words = [word.format(run=tiny_run) for word in OUT_OF_MEMORY]
    result = vmoe(*words)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "vmoe: out of memory: use a smaller --batch-size\n"


@pytest.mark.slow
def test_out_of_memory_names_the_options_of_training_that_help(tmp_path: Path) -> None:
    wide = ("--model.sparse-blocks", "--model.mlp-dim", f"{2**31 - 1}")
    result = vmoe("train", "--config", TINY, "--workdir", tmp_path / "new", *wide)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    remedies = "use --accumulate 2 or more, --model.remat or a smaller --batch-size; "
    assert result.stderr.splitlines()[-1].startswith(f"vmoe: out of memory: {remedies}")


@pytest.mark.process
@pytest.mark.parametrize(
    "command",
    [
        EVALUATE,
        ["train", "--config", "{tiny}", "--workdir", "new"],
        ["predict", "--checkpoint", "vmoe_emoji", "photos"],
    ],
    ids=lambda command: command[0],
)
def test_a_platform_that_is_not_there_is_named_and_no_checkpoint_is_called_corrupt(
    command: list[str], tiny_run: Path, files: Path
) -> None:
    words = [word.format(run=tiny_run, tiny=TINY) for word in command]
    missing = {"JAX_PLATFORMS": "cuda", "CUDA_VISIBLE_DEVICES": ""}
    result = forked(*words, cwd=files, environment=missing)
    assert result.returncode == 2 and not result.stdout, result.stderr
    assert result.stderr.startswith("vmoe: JAX_PLATFORMS=cuda: JAX finds no such device")
    assert result.stderr.count("\n") == 1 and "unset it or use cpu" in result.stderr
    assert not (files / "new").exists()


@pytest.mark.process
def test_a_wrong_variable_of_jax_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", "some")
    result = interpreter("summary", "vit_s32")
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("vmoe: JAX_NUM_CPU_DEVICES=some: Invalid value")


SECTIONS = {
    "attack": AttackConfig(),
    "evaluations": EvalConfig(),
    "mates": MatesConfig(),
    "preprocessing": Preprocessing(8),
    "routing": RoutingOverrides(),
}


def with_value(path: str, value: Any) -> Any:
    """The config of ``tests/tiny.py``, or one of ``SECTIONS``, with another value of a field."""
    section, _, rest = path.partition(".")
    config, names = (SECTIONS[section], rest) if section in SECTIONS else (load(TINY), path)
    for name in reversed(names.split(".")):
        value = {name: value}
    return replace(config, **value)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("attack.epsilon", -1.0, "use at least 0"),
        ("attack.steps", 0, "use at least 1"),
        ("batch_size", 0, "use at least 1"),
        ("data.crop_min_area", 0.0, "use more than 0"),
        ("data.erasing", 1.5, "use at most 1"),
        ("data.num_workers", -1, "use at least 0"),
        ("data.preprocessing.interpolation", "tf_area", "not whole numbers"),
        ("data.rand_augment.magnitude", 31.0, "use at most 30"),
        ("data.rand_augment.num_layers", 17, "use at most 16"),
        ("ema_decay", 1.5, "use less than 1"),
        ("evaluations.image_size", 0, "use at least 1"),
        ("evaluations.name", "", "needs a name"),
        ("fewshot.shots", (), "give at least one"),
        ("fewshot.shots", (5, 0), "use at least 1"),
        ("label_smoothing", 1.0, "use less than 1"),
        ("mates.capacity_factor", (), "give at least one"),
        ("mates.capacity_factor", (0.5, 0.0), "use more than 0"),
        ("mates.draws", 0, "use at least 1"),
        ("model.attention_dropout", -0.1, "use at least 0"),
        ("model.dropout", 1.0, "use less than 1"),
        ("model.moe.router.capacity", 0, "use at least 1"),
        ("model.moe.router.capacity_factor", 0.0, "use more than 0"),
        ("model.moe.router.capacity_multiple", 0, "use at least 1"),
        ("model.moe.experts.dropout", 1.0, "use less than 1"),
        ("model.moe.router.images_per_group", 0, "use at least 1"),
        ("model.moe.router.aux_loss.z", -1.0, "use at least 0"),
        ("model.moe.router.k", 0, "use at least 1"),
        ("model.moe.router.noise_std", -1.0, "use at least 0"),
        ("model.norm_epsilon", 0.0, "use more than 0"),
        ("model.pre_logits", 0, "use at least 1"),
        ("optim.layer_decay", 0.0, "use more than 0"),
        ("optim.lr", float("inf"), "finite number of float32"),
        ("optim.lr_factors.head", -1.0, "use at least 0"),
        ("preprocessing.image_size", 0, "use at least 1"),
        ("routing.images_per_group", 0, "use at least 1"),
        ("seed", 2**32, "use less than 4294967296"),
        ("steps", 0, "use at least 1"),
        ("steps", 10**20, "an int of 64 bits or None"),
    ],
)  # fmt: skip
def test_a_value_that_a_config_refuses_is_named_with_its_field(
    path: str, value: Any, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        with_value(path, value)
    error = caught.value
    assert (error.field, error.value) == (path, value)
    assert str(error).startswith(f"{path}={value}: ")


NO_LR = dict.fromkeys(("head", "routers", "experts", "others"), 0.0)


@pytest.mark.parametrize(
    ("config", "fields", "problem"),
    [
        (lambda: with_value("model.num_heads", 3), {"model.num_heads": 3, "model.width": 16},
         "a divisor of the width"),
        (lambda: with_value("model.patch_size", 3), {"model.patch_size": 3, "model.image_size": 8},
         "a divisor of the image size"),
        (lambda: with_value("model.sparse_blocks", (2,)),
         {"model.sparse_blocks": (2,), "model.depth": 1}, "ascending numbers below the depth"),
        (lambda: with_value("model.moe.num_experts", 1),
         {"model.moe.router.k": 2, "model.moe.num_experts": 1}, "lower k"),
        (lambda: with_value("model.moe.exchange.hot_experts", 1),
         {"model.moe.exchange.hot_experts": 1}, "these experts send slots"),
        (lambda: with_value("model.moe.exchange.buffer_factor", 2.0),
         {"model.moe.exchange.buffer_factor": 2.0}, "these experts send slots"),
        (lambda: with_value("model.moe.exchange.ragged", True),
         {"model.moe.exchange.ragged": True}, "these experts send slots"),
        (lambda: Exchange(ragged=True, chunks=2),
         {"model.moe.exchange.ragged": True, "model.moe.exchange.chunks": 2}, "sent at once"),
        (lambda: MoEConfig(4, CnnExpert(), exchange=Exchange(chunks=2)),
         {"model.moe.exchange.chunks": 2, "model.moe.experts.kind": "cnn"}, "only MLPs of"),
        (lambda: with_value("optim.lr_factors", NO_LR),
         {"optim.lr_factors": LrFactorsConfig(**NO_LR)},
         "optim.lr_factors: head, others, routers, experts are all 0"),
        (lambda: with_value("optim.momentum", 0.5), {"optim.momentum": 0.5, "optim.kind": "adamw"},
         "no effect, only with sgd or adafactor; leave it at 0.9"),
        (lambda: replace(load(TINY), steps=None, epochs=0.5).with_steps(1257),
         {"optim.warmup_steps": 20, "steps": 20}, "at most 19, or more steps"),
        (lambda: replace(load(TINY), steps=None, epochs=1e20).with_steps(1257), {"epochs": 1e20},
         "3928125000000000000000 steps; a run has at most 2147483647"),
        (lambda: with_value("data.shift", 8), {"data.shift": 8, "model.image_size": 8},
         "less than the image size"),
        (lambda: with_value("data.decoder", "fast"),
         {"data.decoder": "fast", "data.preprocessing.interpolation": "bilinear"}, "tf_bilinear"),
        (lambda: replace(load(TINY), evaluations=(EvalConfig(image_size=9),)),
         {"evaluations.image_size": 9, "model.patch_size": 4}, "multiple of the patch size"),
        (lambda: replace(load(TINY), evaluations=(EvalConfig(routing=RoutingOverrides(k=5)),)),
         {"model.moe.router.k": 5, "model.moe.num_experts": 4},
         "evaluations, set 'validation': model.moe.router.k=5"),
        (lambda: RoutingOverrides(dropless=True, capacity_factor=4.0),
         {"routing.capacity_factor": 4.0, "routing.dropless": True}, "have no capacity"),
        (lambda: RoutingOverrides(capacity=4, capacity_factor=4.0),
         {"routing.capacity_factor": 4.0, "routing.capacity": 4}, "overrides the factor"),
        (lambda: FewShotConfig(data=("digits", "digits")), {"fewshot.data": ("digits", "digits")},
         "each once"),
        (lambda: Preprocessing(8).scaled(0), {"preprocessing.image_size": 0}, "use at least 1"),
    ],
)  # fmt: skip
def test_values_that_do_not_fit_each_other_are_all_named(
    config: Callable[[], Any], fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(problem)) as caught:
        config()
    assert caught.value.fields == fields


def fields_of(config: Any, path: str = "") -> Iterator[tuple[str, Any, str]]:
    """For each field of a config and of those in it: its option, its own config and its name."""
    for field in dataclasses.fields(config):
        value, option = getattr(config, field.name), f"{path}{field.name}".replace("_", "-")
        nested = (
            {f"{option}.{i}": x for i, x in enumerate(value)} if field.name == "evaluations" else {}
        )
        nested |= {option: value} if dataclasses.is_dataclass(value) else {}
        if not nested:
            yield f"--{option}", config, field.name
        for prefix, each in nested.items():
            yield from fields_of(each, f"{prefix}.")


def test_the_field_of_an_error_becomes_its_option_for_every_field_of_a_run() -> None:
    """Among all options of the command, and whatever the words of the message."""
    fields = list(fields_of(load(TINY)))
    every = [option for option, _, _ in fields]
    known = re.findall(r"--[\w.-]+", vmoe("train", "--config", TINY, "--help", "all").stdout)
    # configs, which have options where a file or an option gives them
    unset = {"--evaluations.0.preprocessing", "--model.moe.gate", "--model.rotary"}
    assert {*every} - {*known} <= unset
    for option, config, name in fields:
        with pytest.raises(UsageError) as caught:
            config.require(False, "other words", name)
        assert options_of(caught.value.fields, every) == [option]


def test_no_message_spells_a_field_which_would_not_become_an_option() -> None:
    """``UsageError(problem, field=value)`` writes "field=value: problem"."""
    spelled = re.compile(r"f?['\"][a-z_.]+(=|\{\w+\}=| must be | cannot be )\{")
    for path in (ROOT / "vmoe").rglob("*.py"):
        calls = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.Call)]
        for call in calls:
            if ast.unparse(call.func).endswith(("UsageError", "require")):
                texts = list(map(ast.unparse, call.args))
                assert not any(map(spelled.match, texts)), f"{path}: {texts}"


@pytest.mark.process
def test_a_wrong_option_is_one_line_of_words_where_boxes_cannot_be_printed() -> None:
    arguments = ("train", "--config", TINY, "--workdir", "new", "--steps", "many")
    result = forked(*arguments, environment={"PYTHONIOENCODING": "ascii"})
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith("vmoe: Error parsing --steps: ")
    assert "---" not in result.stderr and "helptext" not in result.stderr


READERS: dict[str, Callable[[Path], object]] = {
    "config.json": read_config,
    "classes.json": read_class_names,
    "environment.json": read_environment,
    "init.json": read_init,
    "routing.json": lambda workdir: read_routing_file(workdir / "routing.json"),
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
    with no_more_files(until_retry=True), pytest.raises(VmoeError) as caught:
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


@pytest.mark.process
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
    arguments += ["--data.name", f"folder:{train}", "--steps", "60"]
    broken = train / open_source(f"folder:{train}", "train").path(7)
    garble(broken)
    result = vmoe(*arguments)
    *lines, last = result.stderr.splitlines()
    steps = [line for line in lines if " left  loss " in line or "step 1/60" in line]
    assert result.returncode == 2 and f"{broken}: cannot be read as an image" in last
    assert "Traceback" not in result.stderr
    saved = steps_of(tmp_path / "new")
    assert saved == [len(steps)] and saved[0] > 0


@pytest.mark.process
def test_a_corrupt_image_in_an_evaluation_is_reported_and_the_checkpoint_is_kept(
    files: Path, tmp_path: Path
) -> None:
    for split in ("train", "validation"):
        shutil.copytree(files / "whole", tmp_path / "photos" / split)
    for path in [*(tmp_path / "photos" / "train").rglob("*.png")]:
        shutil.copy(path, path.with_stem(f"{path.stem}-again"))  # enough for a batch
    broken = tmp_path / "photos" / "validation" / "dog" / "3.png"
    garble(broken)
    arguments = ["train", "--config", TINY, "--workdir", tmp_path / "new", "--steps", "60"]
    arguments += ["--data.name", f"folder:{tmp_path / 'photos'}"]
    result = vmoe(*arguments, "--evaluate-every", "30", "--checkpoint-every", "30")
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert f"{broken}: cannot be read as an image" in result.stderr.splitlines()[-1]
    assert steps_of(tmp_path / "new") == [30]


def test_debug_prints_the_traceback() -> None:
    result = vmoe("--debug", "summary", "vmoe_s32")
    assert result.returncode == 2 and "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("vmoe: no model 'vmoe_s32'")
