"""``vmoe routing``."""

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vmoe.cli.arguments import check_folders, parse
from vmoe.cli.data import Sample, data_of
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
    beside: Path | None = None
    """Another model or step with the same classes, to compare."""
    data: str = ""
    """NAME[:SPLIT]; the data set of the run if empty, its test split if no split is named."""
    images: int = 512
    """Number of images, a random sample of the split; at most all of them."""
    batch_size: int = 64
    """Images per batch: those of a batch may compete for slots."""
    routing: RoutingOverrides = RoutingOverrides()
    """Routing settings of --checkpoint; the model of --beside keeps its own."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    check: bool = False
    """Exit with status 3 if something is wrong with the routing."""
    out: Path | None = None
    """Write a page to this .html file, on which to explore the routing of some of the images: one
    file that needs no network."""
    page_images: int = 64
    """Number of images on the page, in random order."""
    removals: bool = True
    """Show on the page what is predicted without each expert: two forward passes for each."""
    export: Path | None = None
    """Write every decision of --checkpoint on every token to this safetensors file; its header says
    what the arrays mean. Of soft routers, which make none, the gates."""
    plots: Path | None = None
    """Draw figures of the routing of --checkpoint in this folder, as PNG files."""
    json: bool = False
    """Print one JSON object and nothing else."""


class Measured(NamedTuple):
    """A model, the sample that it was measured on, and what was found."""

    loaded: "Loaded"
    sample: Sample
    blocks: "dict[int, BlockStatistics]"
    dependence: "BatchDependence"
    findings: "list[Finding]"


def run(argv: Sequence[str]) -> None:
    """Measures the routing of one or two trained models, and prints it."""
    args = parse(RoutingArgs, "routing", argv)
    _check_args(args)
    from vmoe.factory import load

    models = [load(args.checkpoint, routing=args.routing, use_ema=args.use_ema)]
    if args.beside:
        models.append(load(args.beside, use_ema=args.use_ema))
    _check(models)
    data = args.data or data_of(models[0])
    measured = [_measure(args, data, loaded, first=not i) for i, loaded in enumerate(models)]
    _print(args, measured)
    if args.plots:
        _draw(args.plots, measured[0])
    if args.out:
        _write_page(args, measured)
    for each in measured:
        each.sample.print_messages()
    every = [finding for each in measured for finding in each.findings]
    if args.check and every:
        raise CheckFailed(f"--check: {len(every)} finding{'s' * (len(every) > 1)}: {every[0]}")


def _check_args(args: RoutingArgs) -> None:
    check_folders(args, "export", "plots", "out")
    for name, path in (("export", args.export), ("out", args.out)):
        if path and path.is_dir():
            raise UsageError(f"{name}={path}: it is a folder; give a file")
    if args.plots and args.plots.is_file():
        raise UsageError(f"plots={args.plots}: it is a file; give a folder")
    if args.page_images < 1:
        raise UsageError(f"page_images={args.page_images}: use at least 1")


def _check(models: "list[Loaded]") -> None:
    for loaded in models:
        if not loaded.model.config.sparse_blocks:
            raise UsageError(f"{loaded.origin.path}: no block of this model is sparse")
    if len({loaded.class_names for loaded in models}) > 1:
        raise UsageError(
            f"beside={models[1].origin.path}: {len(models[1].class_names)} classes, which are not "
            f"those of {models[0].origin.path}; compare models of the same classes"
        )


def _measure(args: RoutingArgs, data: str, loaded: "Loaded", *, first: bool) -> Measured:
    from vmoe.analysis import statistics
    from vmoe.analysis.collect import collect
    from vmoe.analysis.effects import batch_dependence
    from vmoe.analysis.export import export
    from vmoe.analysis.health import findings

    to = args.export if first else None
    sample = Sample(data, loaded, images=args.images, batch_size=args.batch_size)
    with progress(sample.source.name, sample.steps * (2 if to else 1)) as advance:
        if to:
            export(to, advancing(collect(loaded.model, sample.batches()), advance))
        blocks = statistics(advancing(collect(loaded.model, sample.batches()), advance))
    few = [images[valid] for images, _, valid in sample.batches(at_most=REORDERED)]
    dependence = batch_dependence(loaded.model, np.concatenate(few), batch_size=args.batch_size)
    return Measured(loaded, sample, blocks, dependence, findings(blocks, dependence))


def _write_page(args: RoutingArgs, measured: list[Measured]) -> None:
    from vmoe.evaluate.page import Shown, count_passes, write_page

    assert args.out
    shown = [
        Shown(
            _name(each.loaded),
            each.loaded,
            each.sample.batches,
            list(each.sample.batches(at_most=args.page_images)),
            each.blocks,
        )
        for each in measured
    ]
    start, data = time.perf_counter(), measured[0].sample.source.name
    with progress(f"{args.out}", count_passes(shown, remove=args.removals)) as advance:
        write_page(args.out, data, shown, remove=args.removals, on_step=advance)
    size, seconds = args.out.stat().st_size / 1e6, time.perf_counter() - start
    print(f"{args.out}: {size:.1f} MB, written in {seconds:.0f} s", file=sys.stderr)


def _name(loaded: "Loaded") -> str:
    return str(loaded.origin.path) + ("" if loaded.step is None else f", step {loaded.step:,}")


def _draw(folder: Path, measured: Measured) -> None:
    """Writes the figures, and says how long it took."""
    from vmoe.evaluate.plots import plots_of, write_plots

    loaded, start = measured.loaded, time.perf_counter()
    with progress(f"plots in {folder}", len(plots_of(loaded.model.config))) as advance:
        batches = measured.sample.batches
        files = write_plots(loaded, batches, measured.blocks, folder, on_plot=advance)
    seconds = time.perf_counter() - start
    print(f"{len(files)} plots in {folder}, drawn in {seconds:.0f} s", file=sys.stderr)


def advancing(parts: "Iterator[Collected]", advance: Callable[[], None]) -> "Iterator[Collected]":
    """The same parts; calls ``advance`` after each."""
    for part in parts:
        yield part
        advance()


def _as_json(measured: Measured) -> dict[str, Any]:
    classes = measured.loaded.model.config.num_classes
    return {
        "data": measured.sample.source.name,
        "step": measured.loaded.step,
        "blocks": {str(i): _measures(block, classes) for i, block in measured.blocks.items()},
        "changed_by_batch": measured.dependence.changed,
        "findings": [finding._asdict() for finding in measured.findings],
    }


def _measures(block: "BlockStatistics", classes: int) -> dict[str, Any]:
    information, null = block.class_information(classes)
    return {
        "load": block.load.tolist(),
        "importance": block.importance.tolist(),
        "dropped": block.dropped,
        "unprocessed": block.unprocessed / max(1, block.tokens),
        "kept_share": block.kept_share,
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


def _print(args: RoutingArgs, measured: list[Measured]) -> None:
    if args.json:
        values = [_as_json(each) for each in measured]
        print_json(values if args.beside else values[0])
        return
    for each in measured:
        _print_table(args, each)


def _print_table(args: RoutingArgs, measured: Measured) -> None:
    loaded, dependence = measured.loaded, measured.dependence
    rows = []
    for i, block in measured.blocks.items():
        own = _measures(block, loaded.model.config.num_classes)
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
    place = f"{_name(loaded)}, on {measured.sample.source.name}"
    print_table(COLUMNS, rows, title=f"{place}, {args.batch_size} images per batch")
    print(
        "gate entropy: in percent of even gates; class, position: normalised mutual information "
        "with the expert, and under shuffled classes"
    )
    for i, block in measured.blocks.items():
        shares = [
            f"{x:.0%} of {kind.replace('_', ' ')}"
            for kind, x in block.kept_share.items()
            if x is not None
        ]
        if block.dropped and shares:
            print(f"block {i}: choices with a slot: {', '.join(shares)}")
    print(f"predictions that depend on the other images of a batch: {dependence.changed:.1%}")
    for finding in measured.findings:
        print(one_line(str(finding)))
    if not measured.findings:
        print("nothing is wrong: no dead expert, no collapse, no overflow")
