"""``vmoe inspect``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_json, print_table
from vmoe.errors import one_line

if TYPE_CHECKING:
    from vmoe.checkpoints.inspection import Inspection


@dataclasses.dataclass(frozen=True)
class InspectArgs:
    """List the arrays of a checkpoint, the parameters they become, and the resulting model.

    Example: `vmoe inspect vmoe_emoji`
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Trained model, as for `vmoe evaluate --checkpoint`."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Prints the arrays of a checkpoint, and the model."""
    args = parse(InspectArgs, "inspect", argv)
    from vmoe.checkpoints.inspection import inspect

    inspection = inspect(args.source)
    if args.json:
        print_json(_as_json(inspection))
    else:
        _print(args, inspection)


def _as_json(inspection: "Inspection") -> dict[str, object]:
    from vmoe.config import to_json

    model = inspection.model
    return {
        "format": inspection.format,
        "arrays": [array._asdict() for array in inspection.arrays],
        "config": None if model is None else json.loads(to_json(model.config)),
        "preprocessing": None if model is None else dataclasses.asdict(model.preprocessing),
        "class_names": None if model is None else model.class_names,
        "assumed": [] if model is None else model.origin.assumed,
        "reason": inspection.reason,
    }


def _print(args: InspectArgs, inspection: "Inspection") -> None:
    from vmoe.costs.summary import summarize

    rows = [
        (
            array.name,
            " x ".join(map(str, array.shape)) or "scalar",
            array.dtype,
            f"{array.nbytes:,}",
            "unknown" if array.paths is None else ", ".join(array.paths) or "not used",
        )
        for array in inspection.arrays
    ]
    print_table(
        ("array", "shape", "dtype", "bytes", "parameter"),
        rows,
        title=one_line(f"{args.source}: {inspection.format}, {len(rows)} arrays"),
    )
    if inspection.model is None:
        print(one_line(inspection.reason))
        return
    print(summarize(inspection.model.config, title="the model"))
    for line in inspection.model.origin.assumed:
        print(one_line(f"assumed: {line}"))
