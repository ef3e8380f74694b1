"""Reports of a run: columns of CSV files, tags of TensorBoard and W&B, lines of the log."""

from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from vmoe.config import ViTConfig
from vmoe.config.evaluation import Weights
from vmoe.evaluate import NamedEvaluation
from vmoe.evaluate.fewshot import FewShotResult
from vmoe.train.sinks import Entry, Row
from vmoe.train.timing import COLUMNS

LEADING = ("loss", "accuracy", "aux_loss", "dropped", "unprocessed", "lr", "gradient_norm")
"""The first columns of metrics.csv; the columns of ``timing`` follow."""
EVALUATION = (  # columns of evaluations.csv
    *("images", "accuracy", "top5_accuracy", "cross_entropy", "brier"),
    *("calibration_error", "dropped", "unprocessed", "images_per_second"),
)


def training_entry(metrics: dict[str, Any], timing: Row, model: ViTConfig) -> Entry:
    """The metrics of a step: a row of metrics.csv, and the rows of experts.csv.

    Args:
        metrics: metrics of ``train_step``, on the host; emptied here.
        timing: a row of ``StepTimer``.
    """
    blocks: dict[int, dict[str, np.ndarray]] = metrics.pop("blocks")
    row: Row = {name: float(metrics.pop(name)) for name in LEADING} | timing
    if not model.can_drop:
        row["dropped"] = None
    experts: list[Row] = []
    for block, measures in blocks.items():
        load, importance = measures.pop("load"), measures.pop("importance")
        if not model.moe_blocks[block].router.can_drop:
            del measures["dropped"]
        row |= {f"block{block}/{name}": float(value) for name, value in measures.items()}
        experts += [
            {"block": block, "expert": e, "load": load[e], "importance": importance[e]}
            for e in range(len(load))
        ]
    row |= {name: float(value) for name, value in flatten_dict(metrics, sep="/").items()}
    scalars = {name if "/" in name else f"train/{name}": value for name, value in row.items()}
    for expert in experts:
        for name in ("load", "importance"):
            scalars[f"block{expert['block']}/{name}/{expert['expert']}"] = expert[name]
    return Entry(
        rows={"metrics.csv": [row], "experts.csv": experts},
        scalars={tag: value for tag, value in scalars.items() if value is not None},
        texts=[
            f"loss {row['loss']:.3f}",
            f"accuracy {row['accuracy']:.1%}",
            f"lr {row['lr']:.1e}",
            *_drops(row, model),
            *_timing_texts(timing),
        ],
        passing=True,
    )


def evaluation_entry(evaluation: NamedEvaluation, model: ViTConfig, batch_size: int) -> Entry:
    """An evaluation in batches of a size: a row of evaluations.csv."""
    name, weights, result = evaluation
    metrics = {metric: getattr(result, metric) for metric in EVALUATION}
    row = {"set": name, "weights": weights} | metrics | {"batch_size": batch_size}
    return Entry(
        rows={"evaluations.csv": [row]},
        scalars={f"{name}_{weights}/{m}": v for m, v in metrics.items() if v is not None},
        texts=[
            f"{name}{_average(weights)} {result.accuracy:.2%}",
            f"cross-entropy {result.cross_entropy:.3f}",
            *_drops(row, model),
        ],
    )


def fewshot_entry(weights: Weights, result: FewShotResult) -> Entry:
    """The few-shot probes of a step: rows of fewshot.csv."""
    rows = [
        {"data": data, "weights": weights, "shots": shots, "l2": l2, "accuracy": accuracy}
        for data, accuracies in result.accuracy.items()
        for shots, l2, accuracy in zip(result.shots, result.l2, accuracies, strict=True)
    ]
    group, means = f"fewshot_{weights}", list(zip(result.shots, result.mean, strict=True))
    scalars = {f"{group}/{row['data']}/{row['shots']}": row["accuracy"] for row in rows}
    return Entry(
        rows={"fewshot.csv": rows},
        scalars=scalars | {f"{group}/mean/{shots}": mean for shots, mean in means},
        texts=[f"few-shot{_average(weights)}", *(f"{n}: {mean:.2%}" for n, mean in means)],
    )


def _average(weights: Weights) -> str:
    return " (EMA)" if weights == "ema" else ""


def _drops(row: Row, model: ViTConfig) -> list[str]:
    """The dropped choices if tokens choose, else the tokens without a routed expert."""
    if not model.sparse_blocks:
        return []
    if model.can_drop:
        return [f"dropped {row['dropped']:.1%}"]
    return [f"unprocessed {row['unprocessed']:.1%}"]


def _timing_texts(row: Row) -> list[str]:
    """Speed and shares of the time; empty if the times are unknown."""
    speed, flops, mfu, *split = (row[column] for column in COLUMNS)
    if speed is None:
        return []
    seconds = sum(split)
    compute = [] if flops is None else [f"{flops / 1e9:,.4g} GFLOP/s"]
    return [
        f"{speed:,.0f} images/s",
        *(compute if mfu is None else [f"MFU {mfu:.1%}"]),
        f"data {row['seconds/data'] / seconds:.0%}",
        f"reporting {row['seconds/reporting'] / seconds:.0%}",
    ]
