"""``vmoe inspect``."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_json, print_table
from vmoe.errors import one_line

if TYPE_CHECKING:
    from vmoe.checkpoints.inspection import Inspection


@dataclasses.dataclass(frozen=True)
class InspectArgs:
    """List the arrays of a checkpoint, the parameters they become, and the resulting model."""

    source: tyro.conf.Positional[Path]
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

    config, details = inspection.config, inspection.details
    return {
        "format": inspection.format,
        "arrays": [array._asdict() for array in inspection.arrays],
        "config": None if config is None else json.loads(to_json(config)),
        "preprocessing": None if details is None else dataclasses.asdict(details.preprocessing),
        "class_names": None if details is None else details.class_names,
        "assumed": [] if details is None else details.assumed,
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
    if inspection.config is None or inspection.details is None:
        print(one_line(inspection.reason))
        return
    print(summarize(inspection.config, title="the model"))
    for line in inspection.details.assumed:
        print(one_line(f"assumed: {line}"))
