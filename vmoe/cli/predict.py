"""``vmoe predict``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.cli.routing_file import load_with_routing
from vmoe.config import RoutingOverrides
from vmoe.errors import Failure, UsageError, listed, one_line

if TYPE_CHECKING:
    from vmoe.evaluate import Prediction

LISTED = 20  # unreadable images that an error names


@dataclasses.dataclass(frozen=True)
class PredictArgs:
    """Classify image files, and show the experts that process each image.

    Each image is a group of its own, so its prediction does not depend on the other images.

    Example: `vmoe predict --checkpoint vmoe_emoji photos --top 3`
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, folders of them, patterns such as 'photos/**/*.jpg'."""
    checkpoint: Path
    """Trained model: a run folder, or checkpoints/STEP, checkpoints/best or checkpoints/last in it;
    a file or folder of other weights, their URL, or a name of `vmoe models --pretrained`."""
    top: int = 5
    """Number of classes shown per image."""
    image_size: int | None = None
    """Input resolution in pixels; if None, the resolution of the training. Resize and crop sizes
    scale with it, and position embeddings are resampled."""
    routing: RoutingOverrides = RoutingOverrides()
    routing_file: str = ""
    """Use the routing in this file, which `vmoe capacity` wrote; `none` for the routing as trained.
    If empty, routing.json of the run folder is used, if it exists and no --routing is given."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    json: bool = False
    """Print one JSON list and nothing else."""


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
    from vmoe.data.sources import skipped_messages
    from vmoe.evaluate import image_files, predict

    paths, skipped = image_files(args.images)
    loaded = load_with_routing(
        args.checkpoint, args.routing_file, routing=args.routing, use_ema=args.use_ema
    )
    if args.image_size is not None:
        scaled = loaded.preprocessing.scaled(args.image_size)
        loaded = dataclasses.replace(loaded, preprocessing=scaled)
    unreadable: list[UsageError] = []
    add = unreadable.append if len(paths) > 1 else None  # the only image: its error is raised
    predictions = predict(loaded, paths, top=args.top, on_unreadable=add)
    if args.json:
        print_json(list(predictions))
    else:
        for prediction in predictions:
            _print(prediction, sigmoid=loaded.sigmoid)
    print_messages(skipped_messages([skipped]))
    if unreadable:
        reasons = listed(list(map(str, unreadable)), LISTED, separator="; ")
        raise Failure(f"{len(unreadable)} of {len(paths)} images have no prediction: {reasons}")


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
