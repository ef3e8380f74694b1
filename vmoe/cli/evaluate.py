"""``vmoe evaluate``."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe.cli.arguments import check_outputs, parse
from vmoe.cli.model import DeviceArgs, ModelArgs
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.errors import one_line
from vmoe.fields import at_least
from vmoe.host.progress import progress

if TYPE_CHECKING:
    from vmoe.data.sources import Source
    from vmoe.evaluate import Evaluation
    from vmoe.factory import Loaded

MOST_CONFUSED = 3  # confused classes shown per row of the table


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateArgs(DeviceArgs, ModelArgs):
    """Evaluate a trained model on a whole split; every image counts once.

    Example: `vmoe evaluate --checkpoint vmoe_emoji --data emoji_sample`
    """

    data: str = ""
    """NAME[:SPLIT], such as folder:PATH:validation. If empty, the data set of the run; without a
    split, the test split."""
    batch_size: int = 256
    """Images per batch and device; only images of one batch on one device can compete for slots."""
    per_class: bool = False
    """Print the accuracy of each class, and the classes it is confused with."""
    json: bool = False
    """Print one JSON object and nothing else."""
    csv: Path | None = None
    """Append a row with the metrics, settings and versions of this evaluation to this file."""
    predictions: Path | None = None
    """Write a row for each image to this CSV file, in the order of the data: its labels, the
    prediction, its probability, and whether it is correct (1 or 0)."""


def run(argv: Sequence[str]) -> None:
    """Evaluates a trained model, and prints its metrics."""
    args = parse(EvaluateArgs, "evaluate", argv)
    check_outputs(args, "predictions")
    from vmoe.evaluate.table import check_file

    if args.csv:
        check_file(args.csv)
    loaded = args.load(**args.devices)
    from vmoe.data.pipeline import start_workers
    from vmoe.data.reading import Reading
    from vmoe.data.sources import skipped_messages
    from vmoe.data.unreadable import Unreadable
    from vmoe.evaluate import evaluate
    from vmoe.evaluate.sample import open_data

    source, replace = open_data(args.data, loaded)
    left_out = Unreadable("left out")
    at_least(1).check(batch_size=args.batch_size)
    size, how = args.batch_size * loaded.model.placement.devices, loaded.preprocessing
    with (
        start_workers(args.num_workers, source, size, how) as workers,
        progress(f"{source.name}, batches read by {workers}", -(-len(source) // size)) as advance,
    ):
        evaluation = evaluate(
            loaded.model,
            source,
            Reading(
                size, workers, on_batch=advance, on_unreadable=left_out.add if replace else None
            ),
            preprocessing=how,
            loss=loaded.loss,
        )
    print_messages([*skipped_messages([source]), *left_out.news()])
    with contextlib.ExitStack() as files:  # each is written, whatever else cannot be
        if args.predictions:
            files.callback(_write_predictions, args.predictions, source, evaluation)
        if args.csv:
            files.callback(_append_row, args.csv, loaded, evaluation)
        _print(args, loaded, evaluation)


def _write_predictions(path: Path, source: "Source", evaluation: "Evaluation") -> None:
    from vmoe.evaluate.table import write_predictions

    write_predictions(path, source, evaluation)
    print_messages([f"{path}: {evaluation.images:,} rows written"])


def _append_row(path: Path, loaded: "Loaded", evaluation: "Evaluation") -> None:
    from vmoe.evaluate.table import append_row

    append_row(path, loaded, evaluation)
    print_messages([f"{path}: a row added"])


def _print(args: EvaluateArgs, loaded: "Loaded", evaluation: "Evaluation") -> None:
    from vmoe.evaluate.table import per_class, remarks, summary
    from vmoe.health import all_clear, findings

    found = findings(loaded.model.config, evaluation.totals) if evaluation.totals else []
    by_class = per_class(evaluation) if args.per_class else {}
    if args.json:
        report = {"step": loaded.step, "weights": loaded.origin.weights} | evaluation.metrics()
        report["standard_error"] = evaluation.standard_error
        if evaluation.totals:
            report["findings"] = [each._asdict() for each in found]
        if loaded.routing_file:
            report["routing_file"] = str(loaded.routing_file[0])
        print_json(report | ({"per_class": by_class} if args.per_class else {}))
        return
    print_table(("", ""), summary(evaluation), title=f"{named(loaded)}, on {evaluation.data}")
    if args.per_class:
        columns = ("class", "images", "accuracy", "most often confused with")
        print_table(columns, _class_rows(by_class))
    for line in remarks(evaluation):
        print(one_line(line))
    if evaluation.totals:
        for line in found or [f"routing: {all_clear(loaded.model.config, evaluation.totals)}"]:
            print(one_line(str(line)))


def named(loaded: "Loaded") -> str:
    """The model of a table's title."""
    average = " (moving average)" if loaded.origin.weights == "ema" else ""
    step = "" if loaded.step is None else f", step {loaded.step}"
    return f"{loaded.origin.path}{step}{average}"


def _class_rows(by_class: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    from vmoe.evaluate.table import with_error

    for name, row in by_class.items():
        confused = list(row["confused_with"].items())[:MOST_CONFUSED]
        others = ", ".join(f"{other} ({count})" for other, count in confused)
        accuracy = with_error(row["accuracy"], row["standard_error"])
        yield name, f"{row['images']:,}", accuracy, others
