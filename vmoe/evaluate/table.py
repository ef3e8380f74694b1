"""An evaluation as a table, by class, as a row of a CSV file, and with a row per image."""

import csv
import datetime
import hashlib
import importlib.metadata
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from vmoe.analysis.statistics import standard_error
from vmoe.config import ViTConfig, to_json
from vmoe.data.sources import Source
from vmoe.errors import UsageError, writing
from vmoe.evaluate.classification import Evaluation
from vmoe.evaluate.metrics import confusion, true_classes
from vmoe.evaluate.predict import Prediction
from vmoe.factory import Loaded
from vmoe.workdir.layout import append_bytes, replace_text


def summary(evaluation: Evaluation) -> list[tuple[str, str]]:
    """The names of an evaluation's metrics, and their values with units."""
    missing, sigmoid = evaluation.unlabeled, evaluation.probabilities == "sigmoid"
    rows = [
        ("images", f"{evaluation.images:,}, {evaluation.image_size} px"),
        *([("images without a label", f"{missing:,}, left out")] if missing else []),
        ("accuracy", with_error(evaluation.accuracy, evaluation.standard_error)),
        *_known("accuracy over all images", evaluation.accuracy_over_all),
        *_known("top-5 accuracy", evaluation.top5_accuracy),
        *([("probabilities", "sigmoid of each class")] if sigmoid else []),
        ("cross-entropy", f"{evaluation.cross_entropy:.4f} nats"),
        ("Brier score", f"{evaluation.brier:.4f}"),
        ("calibration error", f"{evaluation.calibration_error:.2%}"),
        *_known("choices dropped", evaluation.dropped),
        *_known("tokens without a routed expert", evaluation.unprocessed),
    ]
    if evaluation.images_per_group:
        factors = _joined(_factor(x) for x in evaluation.capacity_factor.values())
        images = _joined(evaluation.images_per_group.values())
        size = evaluation.batch_size // evaluation.devices
        split = f" on each of {evaluation.devices} devices" * (evaluation.devices > 1)
        rows += [
            ("capacity factor", factors if factors == "none" else f"{factors} after rounding"),
            ("grouping", f"up to {images} images a group, {size} a batch{split}"),
            ("order of the images", evaluation.order),
        ]
    return [*rows, ("speed", f"{evaluation.images_per_second:,.0f} images/s")]


def _known(name: str, share: float | None) -> list[tuple[str, str]]:
    """A row for a share of all images, choices or tokens; none if it is not defined."""
    return [] if share is None else [(name, f"{share:.2%}")]


def with_error(accuracy: float, error: float) -> str:
    """An accuracy, and its standard error in points unless that is NaN, as of one image."""
    return f"{accuracy:.2%}" + (f" ± {100 * error:.2f}" if error == error else "")


def per_class(evaluation: Evaluation) -> dict[str, dict[str, Any]]:
    """By class: number of images, accuracy with its standard error, and other classes predicted.

    The most frequent of these are first. A class without images is left out.
    """
    names, groups = evaluation.class_names, evaluation.groups
    counts, true = (
        confusion(evaluation.per_example, len(names)),
        true_classes(evaluation.per_example),
    )
    order = np.argsort(true, kind="stable")
    ends = np.searchsorted(true[order], np.arange(len(names)), side="right")
    correct, table = np.asarray(evaluation.per_example.correct), {}
    for i, (start, end) in enumerate(itertools.pairwise(counts.indptr)):
        predicted, images = counts.indices[start:end], counts.data[start:end]
        if not len(images):
            continue
        own = order[ends[i] - images.sum() : ends[i]]
        most_first = [j for j in np.argsort(-images, kind="stable") if predicted[j] != i]
        table[names[i]] = {
            "images": int(images.sum()),
            "accuracy": float(images[predicted == i].sum() / images.sum()),
            "standard_error": standard_error(correct[own], None if groups is None else groups[own]),
            "confused_with": {
                names[predicted[j]] if predicted[j] < len(names) else "other": int(images[j])
                for j in most_first
            },
        }
    return table


COLUMNS = (
    *("date", "checkpoint", "step", "weights", "seed", "data", "images", "unlabeled", "accuracy"),
    *("top5_accuracy", "probabilities", "cross_entropy", "brier", "calibration_error", "dropped"),
    *("unprocessed", "image_size", "batch_size", "order", "devices", "router", "k", "priority"),
    *("images_per_group", "capacity_factor", "images_per_second", "model", "vmoe", "jax", "device"),
)


def check_file(path: Path) -> None:
    """Checks that ``append_row`` can add to a file, before an evaluation is run.

    Raises:
        UsageError: the file has other columns or cannot be read, or its folder does not exist.
    """
    try:
        with path.open(newline="") as file:
            if next(csv.reader(file), list(COLUMNS)) != list(COLUMNS):
                raise UsageError(f"{path}: it has other columns; use another file")
    except FileNotFoundError:
        if not path.parent.is_dir():
            raise UsageError(f"{path}: no folder {path.parent}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {getattr(error, 'strerror', 'not a CSV file')}") from None


def append_row(path: Path, loaded: Loaded, evaluation: Evaluation) -> None:
    """Adds an evaluation to a CSV file, with its model, settings and versions.

    Raises:
        Failure: the file cannot be written; it is then unchanged.
    """
    check_file(path)
    config, run = loaded.model.config, loaded.train_config
    row = {
        **{k: v for k, v in evaluation.metrics().items() if k in COLUMNS},
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "checkpoint": str(loaded.origin.path),
        "step": loaded.step,
        "weights": loaded.origin.weights,
        "seed": "" if run is None else run.seed,
        **_settings(config),
        "capacity_factor": _joined(_factor(x) for x in evaluation.capacity_factor.values()),
        "model": hashlib.sha256(to_json(config).encode()).hexdigest()[:12],
        "vmoe": importlib.metadata.version("vmoe"),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
    }
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS)
    with writing(path):
        if not (content := path.read_bytes() if path.exists() else b""):
            writer.writeheader()
        elif not content.endswith(b"\n"):  # the last row lacks its newline
            text.write("\r\n")
        writer.writerow(row)
        append_bytes(path, text.getvalue().encode())


def remarks(evaluation: Evaluation) -> Iterator[str]:
    """A line if the accuracy is about that of always predicting the most frequent class."""
    labels = evaluation.per_example.labels
    counts = np.bincount(labels[labels >= 0], minlength=1)
    share = counts.max() / evaluation.labeled
    if np.count_nonzero(counts) > 1 and evaluation.accuracy < share + 2 * evaluation.standard_error:
        yield (
            f"the accuracy is not clearly above {share:.2%}, that of always predicting "
            f"{evaluation.class_names[counts.argmax()]}: the model may have learned nothing"
        )


def write_predictions(path: Path, source: Source, evaluation: Evaluation) -> None:
    """Writes a CSV file with a row for each image, in the order of the data.

    Several labels are separated by ``|``, as in lists of images. Images that could not be read have
    no row. Image files are read a second time, for their names.

    Args:
        source: the evaluated images.

    Raises:
        Failure: the file cannot be written.
    """
    images, names = evaluation.per_example, evaluation.class_names
    lines = [("image", "labels", "prediction", "probability", "correct")]
    rows = zip(images.labels, images.predictions, images.confidence, images.correct, strict=True)
    for i, (labels, prediction, probability, correct) in zip(evaluation.indices, rows, strict=True):
        known = [names[label] for label in labels if label >= 0]
        lines.append(
            (
                source[i].origin,
                "|".join(known),
                names[prediction] if prediction < len(names) else f"class {prediction}",
                f"{probability:.4f}",
                str(int(correct)) if known else "",
            )
        )
    _write(path, lines)


def write_predicted(path: Path, predictions: Iterable[Prediction]) -> None:
    """Writes a CSV file with the likeliest class of each image file, and its probability.

    Raises:
        Failure: the file cannot be written.
    """
    rows = ((each.path, each.classes[0], f"{each.probabilities[0]:.4f}") for each in predictions)
    _write(path, [("image", "prediction", "probability"), *rows])


def _write(path: Path, rows: Iterable[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    encoded = text.getvalue().encode(errors="backslashreplace")  # names of files can be any bytes
    with writing(path):
        replace_text(path, encoded.decode())


def _settings(config: ViTConfig) -> dict[str, str]:
    """The routing settings of the sparse blocks: one value, or one for each block."""
    layers = config.moe_blocks.values()
    routers = [layer.router for layer in layers]
    return {
        "router": _joined(router.kind for router in routers),
        "k": _joined(r.k if r.can_drop else "" for r in routers),
        "priority": _joined(r.priority if r.has("priority") else "" for r in routers),
        "images_per_group": _joined(layer.router.images_per_group for layer in layers),
    }


def _factor(factor: float | None) -> str:
    return "none" if factor is None else f"{factor:.4g}"


def _joined(values: Any) -> str:
    """The value that all blocks share, or one for each block; empty for a dense model."""
    values = [str(value) for value in values]
    return values[0] if len(set(values)) == 1 else "/".join(values)
