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

    found = inspect(args.source)
    if args.json:
        print_json(_as_json(found))
    else:
        _print(args, found)


def _as_json(found: "Inspection") -> dict[str, object]:
    from vmoe.config import to_json

    config, details = found.config, found.details
    return {
        "format": found.format,
        "arrays": [array._asdict() for array in found.arrays],
        "config": None if config is None else json.loads(to_json(config)),
        "preprocessing": None if details is None else dataclasses.asdict(details.preprocessing),
        "class_names": None if details is None else details.class_names,
        "assumed": [] if details is None else details.assumed,
        "reason": found.reason,
    }


def _print(args: InspectArgs, found: "Inspection") -> None:
    from vmoe.costs.summary import summarize

    rows = [
        (
            array.name,
            " x ".join(map(str, array.shape)) or "scalar",
            array.dtype,
            f"{array.nbytes:,}",
            "unknown" if array.paths is None else ", ".join(array.paths) or "not used",
        )
        for array in found.arrays
    ]
    print_table(
        ("array", "shape", "dtype", "bytes", "parameter"),
        rows,
        title=one_line(f"{args.source}: {found.format}, {len(rows)} arrays"),
    )
    if found.config is None or found.details is None:
        print(one_line(found.reason))
        return
    print(summarize(found.config, title="the model"))
    for line in found.details.assumed:
        print(one_line(f"assumed: {line}"))
