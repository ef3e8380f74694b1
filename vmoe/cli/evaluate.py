"""``vmoe evaluate``."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from vmoe.cli.arguments import check_outputs, parse
from vmoe.cli.printing import print_json, print_messages, print_table, progress
from vmoe.cli.routing_file import load_with_routing
from vmoe.config import FewShotConfig, RoutingOverrides
from vmoe.config.data import CHECKS
from vmoe.errors import UsageError, one_line

if TYPE_CHECKING:
    from vmoe.data.sources import Source
    from vmoe.evaluate import Evaluation
    from vmoe.evaluate.fewshot import FewShotResult
    from vmoe.factory import Loaded

MOST_CONFUSED = 3  # confused classes shown per row of the table
PREPARED = {
    "model": "images were prepared as for the model (--fewshot-preprocessing paper for the paper's "
    "resize and crop)",
    "paper": "images were resized to 256/224 of the model's size and cropped, as in the paper "
    "(--fewshot-preprocessing model to prepare them as for the model)",
}
L2_CHOSEN = {
    "test": "each L2 was chosen on the test images, as in the paper, so that accuracies are "
    "optimistic; --fewshot-l2 train avoids this",
    "train": "each L2 was chosen on training images that are not used as shots",
}


@dataclasses.dataclass(frozen=True)
class EvaluateArgs:
    """Evaluate a trained model on a whole split; every image counts once.

    Example: `vmoe evaluate --checkpoint vmoe_emoji --data emoji_sample`
    """

    checkpoint: Path
    """Trained model: a run folder, or checkpoints/STEP, checkpoints/best or checkpoints/last in it;
    a file or folder of other weights, their URL, or a name of `vmoe models --pretrained`."""
    data: tuple[str, ...] = ()
    """NAME[:SPLIT], such as folder:PATH:validation. If empty, the data set of the run; without a
    split, the test split. With --fewshot one or more, each NAME or NAME:TRAIN,TEST."""
    batch_size: int = 256
    """Images per batch; only images of one batch can compete for slots."""
    image_size: int | None = None
    """Input resolution in pixels; if None, the resolution of the training. Resize and crop sizes
    scale with it, and position embeddings are resampled."""
    routing: RoutingOverrides = RoutingOverrides()
    routing_file: str = ""
    """Use the routing in this file, which `vmoe capacity` wrote; `none` for the routing as trained.
    If empty, routing.json of the run folder is used, if it exists and no --routing is given."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    fewshot: str | None = None
    """Evaluate the features instead of the head: fit linear probes on these numbers of training
    images per class, such as 1,5,10,25."""
    fewshot_seed: int = 0
    """Seed of the choice of the training images of a probe."""
    fewshot_l2: Literal["test", "train"] = "test"
    """Images on which the L2 penalty of a probe is chosen. test: the test images, as in the paper,
    which gives optimistic accuracies; train: other training images."""
    fewshot_preprocessing: Literal["model", "paper"] | None = None
    """How the images of a probe are prepared. model: as for the model; paper: resized to 256/224 of
    its size and cropped, as in the paper. If None, paper for published V-MoE weights and their
    copies, model for all others."""
    per_class: bool = False
    """Print the accuracy of each class, and the classes it is confused with."""
    json: bool = False
    """Print one JSON object and nothing else."""
    csv: Path | None = None
    """Append a row with the metrics, settings and versions of this evaluation to this file."""
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
    loaded = load_with_routing(
        args.checkpoint, args.routing_file, routing=args.routing, use_ema=args.use_ema
    )
    (_evaluate if args.fewshot is None else _probe)(args, loaded)


def _evaluate(args: EvaluateArgs, loaded: "Loaded") -> None:
    from vmoe.data.sources import skipped_messages
    from vmoe.data.unreadable import Unreadable
    from vmoe.evaluate import evaluate
    from vmoe.evaluate.sample import open_data

    if len(args.data) > 1:
        raise UsageError("give one; several need fewshot", data=" ".join(args.data))
    source, replace = open_data("".join(args.data), loaded)
    left_out = Unreadable("left out")
    with progress(f"{source.name}, batches", -(-len(source) // max(args.batch_size, 1))) as advance:
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
    from vmoe.routing.health import all_clear, findings

    found = findings(loaded.model.config, evaluation.totals) if evaluation.totals else []
    by_class = per_class(evaluation) if args.per_class else {}
    if args.json:
        report = {"step": loaded.step, "weights": loaded.origin.weights} | evaluation.metrics()
        if evaluation.totals:
            report["findings"] = [each._asdict() for each in found]
        if loaded.routing_file:
            report["routing_file"] = str(loaded.routing_file[0])
        print_json(report | ({"per_class": by_class} if args.per_class else {}))
        return
    print_table(("", ""), summary(evaluation), title=f"{_name(loaded)}, on {evaluation.data}")
    if args.per_class:
        columns = ("class", "images", "accuracy", "most often confused with")
        print_table(columns, _class_rows(by_class))
    for line in remarks(evaluation):
        print(one_line(line))
    if evaluation.totals:
        for line in found or [f"routing: {all_clear(loaded.model.config, evaluation.totals)}"]:
            print(one_line(str(line)))


def _name(loaded: "Loaded") -> str:
    average = " (moving average)" if loaded.origin.weights == "ema" else ""
    step = "" if loaded.step is None else f", step {loaded.step}"
    return f"{loaded.origin.path}{step}{average}"


def _class_rows(by_class: dict[str, dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for name, row in by_class.items():
        confused = list(row["confused_with"].items())[:MOST_CONFUSED]
        others = ", ".join(f"{other} ({count})" for other, count in confused)
        yield name, f"{row['images']:,}", f"{row['accuracy']:.2%}", others


def _probe(args: EvaluateArgs, loaded: "Loaded") -> None:
    """With ``--fewshot``: accuracies of linear probes."""
    from vmoe.data.sources import skipped_messages
    from vmoe.data.unreadable import Unreadable
    from vmoe.evaluate.fewshot import fewshot, open_fewshot

    config = _probe_config(args, loaded)
    checks = loaded.train_config.data.checks if loaded.train_config else CHECKS
    data = open_fewshot(config, checks)
    left_out = Unreadable("left out")
    sources = [source for each in data for source in each.sources]
    steps = len(data) * len(config.shots) + sum(-(-len(x) // config.batch_size) for x in sources)
    with progress("few-shot probes", steps) as advance:
        result = fewshot(
            loaded.model,
            data,
            config,
            loaded.preprocessing,
            image_size=args.image_size,
            on_batch=advance,
            on_unreadable=left_out.add if checks.on_error == "replace" else None,
        )
    of_data = [message for each in data for message in each.messages]
    print_messages([*skipped_messages(sources), *of_data, *left_out.news()])
    if args.json:
        print_json(
            {
                "step": loaded.step,
                "weights": loaded.origin.weights,
                "shots": result.shots,
                "accuracy": result.accuracy,
                "mean": result.mean,
                "l2": result.l2,
                "l2_chosen_on": config.choose_l2,
                "preprocessing": config.preprocessing,
                "seed": config.seed,
            }
        )
        return
    title = f"{_name(loaded)}, few-shot accuracy"
    columns = ("", *(f"{n} shot{'s' * (n > 1)}" for n in result.shots))
    print_table(columns, _probe_rows(result), title=title)
    print(PREPARED[config.preprocessing])
    print(L2_CHOSEN[config.choose_l2])


def _probe_config(args: EvaluateArgs, loaded: "Loaded") -> FewShotConfig:
    from vmoe.evaluate.sample import data_of

    try:
        shots = tuple(int(word) for word in (args.fewshot or "").split(","))
    except ValueError:
        problem = "give numbers of images per class, such as 1,5,10,25"
        raise UsageError(problem, fewshot=args.fewshot) from None
    data = args.data or tuple(filter(None, [data_of(loaded)]))
    if not data:
        problem = "data is missing: the checkpoint does not name its training data; name some"
        raise UsageError(problem).remedied_by(data="NAME")
    # Weights of the paper's authors do not say how images were prepared.
    theirs = (loaded.origin.copied_from or loaded.origin.format) in ("published", "npz")
    return FewShotConfig(
        data=data,
        shots=shots,
        seed=args.fewshot_seed,
        choose_l2=args.fewshot_l2,
        preprocessing=args.fewshot_preprocessing or ("paper" if theirs else "model"),
        batch_size=args.batch_size,
    )


def _probe_rows(result: "FewShotResult") -> Iterator[tuple[str, ...]]:
    """For each data set, their mean, and the chosen L2."""
    mean = [("mean", result.mean)] if len(result.accuracy) > 1 else []
    for name, row in [*result.accuracy.items(), *mean]:
        yield name, *(f"{accuracy:.2%}" for accuracy in row)
    yield "L2", *(f"{l2:.4g}" for l2 in result.l2)
