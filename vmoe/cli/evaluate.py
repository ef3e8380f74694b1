"""``vmoe evaluate``."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vmoe.cli.arguments import check_outputs, parse
from vmoe.cli.data import open_data
from vmoe.cli.fewshot import run_fewshot
from vmoe.cli.inference import load_for_inference
from vmoe.cli.printing import print_json, print_table, progress
from vmoe.config import RoutingOverrides
from vmoe.errors import UsageError, one_line

if TYPE_CHECKING:
    from vmoe.evaluate import Evaluation
    from vmoe.factory import Loaded

MOST_CONFUSED = 3  # confused classes shown per row of the table


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    """Evaluate a trained model on a whole split; every image counts once."""

    checkpoint: Path
    """Run folder, or checkpoints/STEP, checkpoints/best or checkpoints/last in one; other weights,
    their URL or their name, as for vmoe.load."""
    data: tuple[str, ...] = ()
    """NAME[:SPLIT], such as folder:PATH:validation; the data set of the run if empty, its test
    split if no split is named. With --fewshot one or several, each NAME or NAME:TRAIN,TEST."""
    batch_size: int = 256
    image_size: int | None = None
    """Side of the model's input in pixels, to which its preprocessing is scaled; as trained if
    None. Position embeddings are resampled."""
    routing: RoutingOverrides = RoutingOverrides()
    inference: str = ""
    """File that `vmoe capacity` wrote, whose routing to use; `none` for the routing as trained.
    If empty, inference.json of the run folder, if there is one and no --routing is given."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    fewshot: str | None = None
    """Numbers of training images per class, such as 1,5,10,25: instead of the model's own classes,
    measure its features, by a linear probe that is fitted to so few images."""
    fewshot_seed: int = 0
    """Determines which images the probe is fitted to."""
    fewshot_l2: Literal["test", "train"] = "test"
    """Images on which the probe's L2 is chosen: test, as the paper does, which is optimistic; or
    other training images."""
    fewshot_preprocessing: Literal["model", "paper"] | None = None
    """How the probe's images are prepared: as for the model; or as in the paper, resized to 256/224
    of its size and cropped. If None, paper for weights of the V-MoE authors and their copies, model
    for others."""
    per_class: bool = False
    """Add the accuracy of each class, and the classes confused with it."""
    json: bool = False
    """Print one JSON object and nothing else."""
    csv: Path | None = None
    """Append one row for the whole evaluation, with metrics, settings and versions, to this
    file."""
    predictions: Path | None = None
    """Write a row for each image to this CSV file, in the order of the data: its labels, the
    prediction, its probability, and whether it is correct (1 or 0)."""

    no_effect: ClassVar[dict[str, str]] = {
        "fewshot_seed": "without fewshot",
        "fewshot_l2": "without fewshot",
        "fewshot_preprocessing": "without fewshot",
        "per_class": "with fewshot",
        "csv": "with fewshot",
        "predictions": "with fewshot",
    }


def run(argv: Sequence[str]) -> None:
    """Evaluates a trained model, and prints its metrics."""
    args = parse(EvaluateArgs, "evaluate", argv)
    check_outputs(args, "predictions")
    from vmoe.evaluate.table import check_file

    if args.csv:
        check_file(args.csv)
    loaded = load_for_inference(
        args.checkpoint, args.inference, routing=args.routing, use_ema=args.use_ema
    )
    if args.fewshot is None:
        _evaluate(args, loaded)
    else:
        run_fewshot(args, loaded)


def _evaluate(args: EvaluateArgs, loaded: "Loaded") -> None:
    from vmoe.data.problems import Unreadable
    from vmoe.data.sources import skipped_messages
    from vmoe.evaluate import evaluate
    from vmoe.evaluate.table import append_row, write_predictions

    if len(args.data) > 1:
        raise UsageError("give one; several need fewshot", data=" ".join(args.data))
    source, replace = open_data("".join(args.data), loaded)
    left_out = Unreadable("left out")
    with progress(source.name, -(-len(source) // max(args.batch_size, 1))) as advance:
        evaluation = evaluate(
            loaded.model,
            source,
            batch_size=args.batch_size,
            image_size=args.image_size,
            preprocessing=loaded.preprocessing,
            loss=loaded.loss,
            on_batch=advance,
            on_unreadable=left_out.add if replace else None,
        )
    for line in [*skipped_messages([source]), *left_out.news()]:
        print(one_line(line), file=sys.stderr)
    with contextlib.ExitStack() as files:  # each is written, whatever else cannot be
        if args.predictions:
            files.callback(write_predictions, args.predictions, source, evaluation)
        if args.csv:
            files.callback(append_row, args.csv, loaded, evaluation)
        if args.json:
            print_json(_as_json(args, loaded, evaluation))
        else:
            _print(args, loaded, evaluation)


def _as_json(args: EvaluateArgs, loaded: "Loaded", evaluation: "Evaluation") -> dict[str, Any]:
    from vmoe.analysis.health import findings
    from vmoe.evaluate.table import per_class

    result = {"step": loaded.step, "weights": loaded.origin.weights} | evaluation.metrics()
    if evaluation.totals:
        result["findings"] = [
            each._asdict() for each in findings(loaded.model.config, evaluation.totals)
        ]
    if loaded.inference:
        result["inference"] = str(loaded.inference[0])
    return result | ({"per_class": per_class(evaluation)} if args.per_class else {})


def _print(args: EvaluateArgs, loaded: "Loaded", evaluation: "Evaluation") -> None:
    from vmoe.analysis.health import findings
    from vmoe.evaluate.table import summary

    average = " (moving average)" if loaded.origin.weights == "ema" else ""
    step = "" if loaded.step is None else f", step {loaded.step}"
    title = f"{loaded.origin.path}{step}{average}, on {evaluation.data}"
    print_table(("", ""), summary(evaluation), title=title)
    if args.per_class:
        columns = ("class", "images", "accuracy", "most often confused with")
        print_table(columns, _class_rows(evaluation))
    if evaluation.totals:
        every = [str(finding) for finding in findings(loaded.model.config, evaluation.totals)]
        for line in every or ["routing: nothing is wrong"]:
            print(one_line(line))


def _class_rows(evaluation: "Evaluation") -> Iterator[tuple[str, ...]]:
    from vmoe.evaluate.table import per_class

    for name, row in per_class(evaluation).items():
        confused = list(row["confused_with"].items())[:MOST_CONFUSED]
        others = ", ".join(f"{other} ({count})" for other, count in confused)
        yield name, f"{row['images']:,}", f"{row['accuracy']:.2%}", others
