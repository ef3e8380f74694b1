"""An evaluation for readers: a table, its classes, and a row of a file to compare with others."""

import csv
import datetime
import hashlib
import importlib.metadata
from pathlib import Path
from typing import Any

import jax

from vmoe.checkpoints.load import find, run_config
from vmoe.config import ViTConfig, to_json
from vmoe.errors import UsageError
from vmoe.evaluate.classification import Evaluation
from vmoe.evaluate.metrics import confusion
from vmoe.nn.vit import ViT


def summary(found: Evaluation) -> list[tuple[str, str]]:
    """The figures of an evaluation with their names and units."""
    rows = [
        ("images", f"{found.images:,}, {found.image_size} px"),
        ("accuracy", f"{found.accuracy:.2%}"),
        ("top-5 accuracy", f"{found.top5_accuracy:.2%}"),
        ("cross-entropy", f"{found.cross_entropy:.4f} nats"),
        ("Brier score", f"{found.brier:.4f}"),
        ("calibration error", f"{found.calibration_error:.2%}"),
    ]
    if found.images_per_group is not None:
        grouping = f"up to {found.images_per_group} images a group, {found.batch_size} a batch"
        factors = {f"{factor:.3g}" for factor in found.capacity_factor.values()}
        each = [f"{factor:.3g} (block {i})" for i, factor in found.capacity_factor.items()]
        rows += [
            ("choices dropped", f"{found.dropped:.2%}"),
            ("capacity factor", ", ".join(factors if len(factors) == 1 else each) + ", rounded"),
            ("grouping", grouping),
        ]
    return [*rows, ("speed", f"{found.images_per_second:,.0f} images/s")]


def per_class(found: Evaluation) -> dict[str, dict[str, Any]]:
    """By class: its images, their accuracy, and what the others were taken for, most often first.

    A class without images has no accuracy and is left out.
    """
    names = found.class_names
    counts = confusion(found.outcomes, len(names))
    table = {}
    for i, row in enumerate(counts):
        if not row.sum():
            continue
        wrong = sorted((j for j in range(len(row)) if j != i and row[j]), key=lambda j: -row[j])
        table[names[i]] = {
            "images": int(row.sum()),
            "accuracy": float(row[i] / row.sum()),
            "taken_for": {names[j] if j < len(names) else "other": int(row[j]) for j in wrong},
        }
    return table


def append_row(
    path: Path, checkpoint: Path, model: ViT, found: Evaluation, *, weights: str = "raw"
) -> None:
    """Adds a line to a CSV file that says all that is needed to compare evaluations.

    Args:
        weights: "raw", or "ema" for the moving average.

    Raises:
        UsageError: the file has other columns, or cannot be written.
    """
    workdir, steps = find(checkpoint)
    row = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "checkpoint": str(checkpoint),
        "step": steps[-1],
        "weights": weights,
        "seed": run_config(workdir).seed,
        **found.figures(),
        **_settings(model.config),
        "capacity_factor": _joined(f"{x:.4g}" for x in found.capacity_factor.values()),
        "model": hashlib.sha256(to_json(model.config).encode()).hexdigest()[:12],
        "vmoe": importlib.metadata.version("vmoe"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    try:
        with path.open("a+", newline="") as file:
            file.seek(0)
            columns = next(csv.reader(file), None)
            if columns not in (None, list(row)):
                raise UsageError(f"--csv {path}: it has other columns; name another file")
            writer = csv.DictWriter(file, list(row))
            if columns is None:
                writer.writeheader()
            writer.writerow(row)
    except OSError as error:
        raise UsageError(f"--csv {path}: {error.strerror}") from None


def _settings(config: ViTConfig) -> dict[str, str]:
    """What was chosen for the sparse blocks: one value, or one for each."""
    blocks = [config.moe_of(i) for i in config.sparse_blocks]
    return {
        "router": _joined(moe.router.kind for moe in blocks),
        "k": _joined(getattr(moe.router, "k", "") for moe in blocks),
        "priority": _joined(getattr(moe.router, "priority", "") for moe in blocks),
        "images_per_group": _joined(moe.images_per_group for moe in blocks),
    }


def _joined(values: Any) -> str:
    values = [str(value) for value in values]
    return values[0] if len(set(values)) == 1 else "/".join(values)
