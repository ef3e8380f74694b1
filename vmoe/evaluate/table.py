"""An evaluation for readers: a table, its classes, and a row of a file to compare with others."""

import csv
import datetime
import hashlib
import importlib.metadata
import io
from pathlib import Path
from typing import Any

import jax

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
    if found.images_per_group:
        factors = _joined(_factor(x) for x in found.capacity_factor.values())
        images = _joined(found.images_per_group.values())
        rows += [
            ("choices dropped", f"{found.dropped:.2%}"),
            ("capacity factor", factors if factors == "none" else f"{factors} after rounding"),
            ("grouping", f"up to {images} images a group, {found.batch_size} a batch"),
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
            "confused_with": {names[j] if j < len(names) else "other": int(row[j]) for j in wrong},
        }
    return table


COLUMNS = (
    *("date", "checkpoint", "step", "weights", "seed", "data", "images", "accuracy"),
    *("top5_accuracy", "cross_entropy", "brier", "calibration_error", "dropped", "image_size"),
    *("batch_size", "devices", "router", "k", "priority", "images_per_group", "capacity_factor"),
    *("images_per_second", "model", "vmoe", "jax", "device"),
)


def check_file(path: Path) -> None:
    """Refuses a file that ``append_row`` could not add to, before an evaluation takes its time.

    Raises:
        UsageError: the file has other columns, or cannot be read.
    """
    try:
        with path.open(newline="") as file:
            if next(csv.reader(file), list(COLUMNS)) != list(COLUMNS):
                raise UsageError(f"--csv {path}: it has other columns; name another file")
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UsageError(f"--csv {path}: no folder {path.parent}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--csv {path}: {getattr(error, 'strerror', 'no CSV file')}") from None


def append_row(
    path: Path,
    checkpoint: Path,
    step: int,
    model: ViT,
    found: Evaluation,
    *,
    seed: int,
    weights: str = "raw",
) -> None:
    """Adds a line to a CSV file that says all that is needed to compare evaluations.

    Args:
        step: of the checkpoint.
        seed: of the run.
        weights: "raw", or "ema" for the moving average.

    Raises:
        UsageError: the file has other columns, or cannot be written.
    """
    check_file(path)
    row = {
        **found.figures(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "checkpoint": str(checkpoint),
        "step": step,
        "weights": weights,
        "seed": seed,
        **_settings(model.config),
        "capacity_factor": _joined(_factor(x) for x in found.capacity_factor.values()),
        "model": hashlib.sha256(to_json(model.config).encode()).hexdigest()[:12],
        "vmoe": importlib.metadata.version("vmoe"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    try:
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS)
        with path.open("a+", newline="") as file:
            file.seek(0)
            if not (there := file.read()):
                writer.writeheader()
            elif not there.endswith("\n"):  # an editor left the last row without its end
                text.write("\r\n")
            writer.writerow(row)
            file.write(text.getvalue())
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


def _factor(factor: float | None) -> str:
    return "none" if factor is None else f"{factor:.4g}"


def _joined(values: Any) -> str:
    """One value where all are equal, else one for each block; empty for a dense model."""
    values = [str(value) for value in values]
    return values[0] if len(set(values)) == 1 else "/".join(values)
