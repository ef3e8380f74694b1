"""``vmoe predict``."""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import tyro

from vmoe.cli.arguments import check_outputs, parse
from vmoe.cli.model import DeviceArgs, ModelArgs
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.errors import Failure, UsageError, listed, one_line
from vmoe.host.progress import progress

if TYPE_CHECKING:
    from vmoe.data.sources.source import Skipped
    from vmoe.data.workers import Workers
    from vmoe.evaluate import Prediction

LISTED = 20  # unreadable images that an error names


@dataclasses.dataclass(frozen=True, kw_only=True)
class PredictArgs(DeviceArgs, ModelArgs):
    """Classify image files: a line for each, or for one image the experts that process it, too.

    Each image is a group of its own, so its prediction does not depend on the other images.

    Example: `vmoe predict --checkpoint vmoe_emoji photos --top 3`
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, folders of them, patterns such as 'photos/**/*.jpg'."""
    top: int | None = None
    """Number of classes shown per image; if None, 1 in a line of several images, and otherwise
    5."""
    experts: bool = False
    """Show for several images what is shown for one: a table of classes, and the experts used."""
    json: bool = False
    """Print one JSON list and nothing else."""
    predictions: Path | None = None
    """Write a row for each image to this CSV file: the likeliest class and its probability."""

    no_effect: ClassVar[dict[str, str]] = {"experts": "with json"}


def run(argv: Sequence[str]) -> None:
    """Classifies image files, and prints the classes and the experts used."""
    if "" in argv:
        raise UsageError("an image argument is empty; use '.' for the current folder")
    args = parse(PredictArgs, "predict", argv)
    if (images := args.routing.images_per_group) not in (None, 1):
        raise UsageError(
            "each image is a group of its own; vmoe evaluate uses larger groups",
            **{"routing.images_per_group": images},
        )
    check_outputs(args, "predictions")
    from vmoe.data.pipeline import start_workers
    from vmoe.data.sources import skipped_messages
    from vmoe.evaluate import image_files, predict
    from vmoe.evaluate.predict import BATCH, Files
    from vmoe.evaluate.table import write_predicted

    paths, skipped = image_files(args.images)
    loaded = args.load(**args.devices)
    unreadable: list[str] = []
    several = len(paths) > 1
    add = unreadable.append if several else None  # the only image: its error is raised
    lines = several and not args.experts
    top = args.top if args.top is not None else 1 if lines and not args.json else 5
    done = list["Prediction"]()
    files, size = Files(tuple(map(str, paths))), BATCH * loaded.model.placement.devices
    with (
        start_workers(args.num_workers, files, size, loaded.preprocessing) as workers,
        _progress(len(paths), workers, shown=args.json or not sys.stdout.isatty()) as advance,
    ):
        for prediction in predict(loaded, paths, top=top, workers=workers, on_unreadable=add):
            done.append(prediction)
            if not args.json:
                (_print_line if lines else _print)(prediction, sigmoid=loaded.sigmoid)
            advance()
    if args.json:
        print_json(done)
    if args.predictions:
        write_predicted(args.predictions, done)
        print_messages([f"{args.predictions}: {len(done):,} rows written"])
    print_messages(skipped_messages([skipped]))
    if several and not args.json:
        print_messages([_summary(len(done), len(paths), skipped)])
    if unreadable:
        reasons = listed(unreadable, LISTED, separator="; ")
        raise Failure(f"{len(unreadable)} of {len(paths)} images have no prediction: {reasons}")


def _progress(
    images: int, workers: "Workers", *, shown: bool
) -> contextlib.AbstractContextManager[Callable[[], None]]:
    """The progress; lines on a terminal show it themselves, and a bar would be among them."""
    what = f"images, read by {workers}"
    return progress(what, images) if shown else contextlib.nullcontext(lambda: None)


def _summary(predicted: int, given: int, skipped: "Skipped") -> str:
    """How many images were predicted, and how many other files were left out."""
    others = len(skipped.others) + len(skipped.links)
    left = f", {others:,} other {'file was' if others == 1 else 'files were'} skipped"
    return f"{predicted:,} of {given:,} images predicted{left * bool(others)}"


def _print_line(prediction: "Prediction", *, sigmoid: bool) -> None:
    """One line: the file, the likeliest classes and their probabilities."""
    classes = zip(prediction.classes, prediction.probabilities, strict=True)
    shown = ", ".join(f"{name} {probability:.1%}" for name, probability in classes)
    print(one_line(f"{prediction.path}: {shown}"))


def _print(prediction: "Prediction", *, sigmoid: bool) -> None:
    classes = zip(prediction.classes, prediction.probabilities, strict=True)
    rows = [(name, f"{probability:.1%}") for name, probability in classes]
    probability = "sigmoid probability" if sigmoid else "probability"
    print_table(("class", probability), rows, title=one_line(prediction.path))
    if prediction.experts:
        experts = range(max(map(len, prediction.experts.values())))
        print_table(
            ("block", *(f"e{i}" for i in experts)),
            [(str(b), *(f"{x:.0%}" for x in shares)) for b, shares in prediction.experts.items()],
            title="share of each expert in the kept choices, by sparse block",
        )
