"""``vmoe routing``."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vmoe.cli.arguments import parse
from vmoe.cli.data import Sample
from vmoe.cli.printing import print_json, print_table, progress
from vmoe.config import RoutingOverrides
from vmoe.errors import CheckFailed, UsageError, one_line

if TYPE_CHECKING:
    from vmoe.analysis import BlockStatistics, Collected
    from vmoe.analysis.effects import BatchDependence
    from vmoe.analysis.health import Finding
    from vmoe.factory import Loaded

REORDERED = 256  # images whose predictions are compared in several orders


@dataclasses.dataclass(frozen=True)
class RoutingArgs:
    """Show how a trained model uses its experts: loads, drops, and what experts specialise in."""

    checkpoint: Path
    """Trained model, as for `vmoe evaluate --checkpoint`."""
    data: str = ""
    """NAME[:SPLIT]; the data set of the run if empty, its test split if no split is named."""
    images: int = 512
    """Number of images, a random sample of the split; at most all of them."""
    batch_size: int = 64
    """Images per batch: those of a batch may compete for slots."""
    routing: RoutingOverrides = RoutingOverrides()
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    check: bool = False
    """Exit with status 3 if something is wrong with the routing."""
    export: Path | None = None
    """Write every decision of every token to this safetensors file; its header says what the
    arrays mean. Of soft routers, which make none, the gates."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Measures the routing of a trained model, and prints it."""
    args = parse(RoutingArgs, "routing", argv)
    if args.export and not args.export.parent.is_dir():
        raise UsageError(f"export={args.export}: no folder {args.export.parent}; make it first")
    from vmoe.analysis import statistics
    from vmoe.analysis.collect import collect
    from vmoe.analysis.effects import batch_dependence
    from vmoe.analysis.export import export
    from vmoe.analysis.health import findings
    from vmoe.factory import load

    loaded = load(args.checkpoint, routing=args.routing, use_ema=args.use_ema)
    if not loaded.model.config.sparse_blocks:
        raise UsageError(f"{args.checkpoint}: no block of this model is sparse")
    sample = Sample(args.data, loaded, images=args.images, batch_size=args.batch_size)
    with progress(sample.source.name, sample.steps * (2 if args.export else 1)) as advance:
        if args.export:
            export(args.export, advancing(collect(loaded.model, sample.batches()), advance))
        blocks = statistics(advancing(collect(loaded.model, sample.batches()), advance))
    few = [images[valid] for images, _, valid in sample.batches(at_most=REORDERED)]
    dependence = batch_dependence(loaded.model, np.concatenate(few), batch_size=args.batch_size)
    every = findings(blocks, dependence)
    sample.print_messages()
    classes = loaded.model.config.num_classes
    if args.json:
        print_json(_as_json(sample.source.name, loaded, blocks, dependence, every))
    else:
        step = "" if loaded.step is None else f", step {loaded.step}"
        place = f"{loaded.origin.path}{step}, on {sample.source.name}"
        title = f"{place}, {args.batch_size} images per batch"
        _print(title, blocks, dependence, every, classes)
    if args.check and every:
        raise CheckFailed(f"--check: {len(every)} finding{'s' * (len(every) > 1)}: {every[0]}")


def advancing(parts: "Iterator[Collected]", advance: Callable[[], None]) -> "Iterator[Collected]":
    """The same parts; calls ``advance`` after each."""
    for part in parts:
        yield part
        advance()


def _as_json(
    data: str,
    loaded: "Loaded",
    blocks: "dict[int, BlockStatistics]",
    dependence: "BatchDependence",
    every: "list[Finding]",
) -> dict[str, Any]:
    classes = loaded.model.config.num_classes
    return {
        "data": data,
        "step": loaded.step,
        "blocks": {str(i): _measures(block, classes) for i, block in blocks.items()},
        "changed_by_batch": dependence.changed,
        "findings": [finding._asdict() for finding in every],
    }


def _measures(block: "BlockStatistics", classes: int) -> dict[str, Any]:
    information, null = block.class_information(classes)
    return {
        "load": block.load.tolist(),
        "importance": block.importance.tolist(),
        "dropped": block.dropped,
        "unprocessed": block.unprocessed / max(1, block.tokens),
        "gate_entropy": block.gate_entropy,
        "idle": block.idle.tolist(),
        "class_information": information,
        "class_information_null": null,
        "position_information": block.position_information,
    }


COLUMNS = (
    "block",
    "experts",
    "smallest load",
    "largest load",
    "dropped",
    "unprocessed",
    "gate entropy",
    "class (shuffled)",
    "position",
)


def _print(
    title: str,
    blocks: "dict[int, BlockStatistics]",
    dependence: "BatchDependence",
    every: "list[Finding]",
    classes: int,
) -> None:
    rows = []
    for i, block in blocks.items():
        own = _measures(block, classes)
        load = block.load
        rows.append(
            (
                str(i),
                str(len(load)),
                f"{load.min():.1%}",
                f"{load.max():.1%}",
                f"{own['dropped']:.1%}",
                f"{own['unprocessed']:.1%}",
                f"{block.relative_entropy:.0%}",
                f"{own['class_information']:.3f} ({own['class_information_null']:.3f})",
                f"{own['position_information']:.3f}",
            )
        )
    print_table(COLUMNS, rows, title=title)
    print(
        "gate entropy: in percent of even gates; class, position: normalised mutual information "
        "with the expert, and under shuffled classes"
    )
    print(f"predictions that depend on the other images of a batch: {dependence.changed:.1%}")
    for finding in every:
        print(one_line(str(finding)))
    if not every:
        print("nothing is wrong: no dead expert, no collapse, no overflow")
