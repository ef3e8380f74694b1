"""Rows of metrics: their columns in CSV files, their tags in TensorBoard, their texts in a log."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from vmoe.config import ViTConfig
from vmoe.config.evaluation import Weights
from vmoe.evaluate import NamedEvaluation
from vmoe.evaluate.fewshot import FewShotResult
from vmoe.train.timing import timing_texts
from vmoe.train.writers import Row, flatten

LEADING = ("loss", "accuracy", "aux_loss", "dropped", "unprocessed", "lr", "gradient_norm")
"""The first columns of metrics.csv; those of ``timing`` follow."""
EVALUATION = (  # columns of evaluations.csv
    *("images", "accuracy", "top5_accuracy", "cross_entropy", "brier"),
    *("calibration_error", "dropped", "unprocessed", "images_per_second"),
)


def training_rows(metrics: dict[str, Any], timing: Row, model: ViTConfig) -> tuple[Row, list[Row]]:
    """The row of metrics.csv, and those of experts.csv, of one step.

    Args:
        metrics: of ``train_step``, on the host; emptied.
        timing: of ``StepTimer``.
    """
    blocks: dict[int, dict[str, np.ndarray]] = metrics.pop("blocks")
    row: Row = {name: float(metrics.pop(name)) for name in LEADING} | timing
    if not model.can_drop:
        row["dropped"] = None
    experts = []
    for block, measures in blocks.items():
        load, importance = measures.pop("load"), measures.pop("importance")
        if not model.moe_blocks[block].router.can_drop:
            del measures["dropped"]
        row |= flatten({f"block{block}": measures})
        experts += [
            {"block": block, "expert": e, "load": load[e], "importance": importance[e]}
            for e in range(len(load))
        ]
    return row | flatten(metrics), experts


def training_scalars(row: Row, experts: Sequence[Row]) -> Row:
    """The rows of one step by tag."""
    scalars = {name if "/" in name else f"train/{name}": value for name, value in row.items()}
    for expert in experts:
        for name in ("load", "importance"):
            scalars[f"block{expert['block']}/{name}/{expert['expert']}"] = expert[name]
    return {tag: value for tag, value in scalars.items() if value is not None}


def training_texts(row: Row, model: ViTConfig) -> list[str]:
    """The row of one step for the log."""
    return [
        f"loss {row['loss']:.3f}",
        f"accuracy {row['accuracy']:.1%}",
        f"lr {row['lr']:.1e}",
        *_drops(row, model),
        *timing_texts(row),
    ]


def evaluation_row(evaluation: NamedEvaluation) -> Row:
    """The row of evaluations.csv of an evaluation."""
    name, weights, result = evaluation
    metrics = {metric: getattr(result, metric) for metric in EVALUATION}
    return {"set": name, "weights": weights} | metrics


def evaluation_scalars(row: Row) -> Row:
    """The row of an evaluation by tag."""
    group = f"{row['set']}_{row['weights']}"
    return {f"{group}/{name}": row[name] for name in EVALUATION if row[name] is not None}


def evaluation_texts(row: Row, model: ViTConfig) -> list[str]:
    """The row of an evaluation for the log."""
    return [
        f"{row['set']}{_average(row['weights'])} {row['accuracy']:.2%}",
        f"cross-entropy {row['cross_entropy']:.3f}",
        *_drops(row, model),
    ]


def fewshot_rows(weights: Weights, result: FewShotResult) -> list[Row]:
    """The rows of fewshot.csv of the probes of one step."""
    return [
        {"data": data, "weights": weights, "shots": shots, "l2": l2, "accuracy": accuracy}
        for data, accuracies in result.accuracy.items()
        for shots, l2, accuracy in zip(result.shots, result.l2, accuracies, strict=True)
    ]


def fewshot_scalars(weights: Weights, result: FewShotResult) -> Row:
    """The probes of one step by tag."""
    group = f"fewshot_{weights}"
    rows = fewshot_rows(weights, result)
    scalars = {f"{group}/{row['data']}/{row['shots']}": row["accuracy"] for row in rows}
    means = zip(result.shots, result.mean, strict=True)
    return scalars | {f"{group}/mean/{shots}": mean for shots, mean in means}


def fewshot_texts(weights: Weights, result: FewShotResult) -> list[str]:
    """The probes of one step for the log."""
    means = zip(result.shots, result.mean, strict=True)
    return [f"few-shot{_average(weights)}", *(f"{shots}: {mean:.2%}" for shots, mean in means)]


def _average(weights: Weights) -> str:
    return " (EMA)" if weights == "ema" else ""


def _drops(row: Row, model: ViTConfig) -> list[str]:
    """Drops where tokens choose, else tokens without an expert."""
    if not model.sparse_blocks:
        return []
    if model.can_drop:
        return [f"dropped {row['dropped']:.1%}"]
    return [f"unprocessed {row['unprocessed']:.1%}"]
