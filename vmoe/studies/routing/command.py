"""``vmoe routing``."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from vmoe.cli.arguments import check_outputs, parse
from vmoe.cli.model import DeviceArgs, StudyArgs
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.errors import CheckFailed, UsageError, one_line
from vmoe.fields import at_least
from vmoe.host.progress import progress

if TYPE_CHECKING:
    from vmoe.evaluate.sample import Sample
    from vmoe.factory import Loaded
    from vmoe.studies.routing.measure import MeasuredRouting

FEW = 256  # images that are predicted in several orders, or compared between two models


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoutingArgs(DeviceArgs, StudyArgs):
    """Show how a trained model uses its experts: loads, drops, and what experts specialize in.

    Example: `vmoe routing --checkpoint vmoe_emoji --data emoji_sample --out report.html`
    """

    compare: Path | None = None
    """Another model or step with the same classes, to compare, with its own routing."""
    check: bool = False
    """Exit with status 3 if a problem in the routing is found."""
    out: Path | None = None
    """Write an interactive page about the routing of some of the images to this .html file, which
    needs no network."""
    page_images: int = 64
    """Number of images on the page: the first images of the sample."""
    removals: bool = True
    """Show predictions without each expert on the page: two forward passes per expert."""
    export: Path | None = None
    """Write the routing of every token by --checkpoint to this .safetensors file; its header
    describes the arrays. Soft routers make no choices: the file has their gates."""
    plots: Path | None = None
    """Draw figures of the routing of --checkpoint in this folder, as PNG files."""

    no_effect: ClassVar[dict[str, str]] = {
        "page_images": "without out",
        "removals": "without out",
    }


def run(argv: Sequence[str]) -> None:
    """Measures the routing of one or two trained models, and prints it."""
    args = parse(RoutingArgs, "routing", argv)
    check_outputs(args, "export", "out", folders=("plots",))
    at_least(1).check(page_images=args.page_images)
    from vmoe.evaluate.sample import Sample, data_of
    from vmoe.factory import load
    from vmoe.studies.routing.measure import compare_routing, measure_routing

    models = [args.load(**args.devices)]
    if args.compare:
        models.append(load(args.compare, use_ema=args.use_ema, **args.devices))
    _check(models)
    data = args.data or data_of(models[0])
    samples = [
        Sample(data, loaded, images=args.images, batch_size=args.batch_size) for loaded in models
    ]
    sizes = [loaded.preprocessing.image_size for loaded in models]
    largest = samples[sizes.index(max(sizes))]
    with largest.start_workers(args.num_workers) as workers:
        for sample in samples:
            sample.workers = workers
        measured = []
        for loaded, sample in zip(models, samples, strict=True):
            name, few = sample.source.name, sample.batches(at_most=FEW)
            with progress(f"{name}, batches read by {workers}", sample.steps) as advance:
                how = dict(batch_size=args.batch_size, on_batch=advance)
                measured.append(measure_routing(loaded, name, sample.batches, few, **how))
        compared = None
        if args.compare:
            few = [sample.batches(at_most=FEW) for sample in samples]
            with progress("comparing the models", 1):
                compared = compare_routing(*(loaded.model for loaded in models), *few)
        for sample in samples:
            print_messages(sample.messages())
        with contextlib.ExitStack() as files:  # all are written, even if writing one of them fails
            if args.out:
                files.callback(_write_page, args, args.out, measured)
            if args.plots:
                files.callback(_draw, args.plots, measured[0])
            if args.export:
                files.callback(_export, args.export, measured[0], samples[0])
            _print(args, measured, compared)
    every = [
        f"{routing.model_name}: {finding}" if args.compare else str(finding)
        for routing in measured
        for finding in routing.findings
    ]
    if args.check and every:
        number = f"{len(every)} finding{'s' * (len(every) > 1)}"
        raise CheckFailed(f"--check: {number}: {'; '.join(every)}")


def _check(models: "list[Loaded]") -> None:
    for loaded in models:
        if not loaded.model.config.sparse_blocks:
            raise UsageError(f"{loaded.origin.path}: no block of this model is sparse")
    if len({loaded.class_names for loaded in models}) > 1:
        raise UsageError(
            f"its {len(models[1].class_names)} classes differ from the classes of "
            f"{models[0].origin.path}; compare models with the same classes",
            compare=models[1].origin.path,
        )


def _print(
    args: RoutingArgs,
    measured: "list[MeasuredRouting]",
    compared: dict[int, dict[str, float | None]] | None,
) -> None:
    from vmoe.data.pipeline import ORDER
    from vmoe.studies.routing import report

    if args.json:
        first, *others = (report.values(routing) | {"order": ORDER} for routing in measured)
        if compared is None:
            print_json(first)
        else:
            print_json([first, *(other | {"compared": compared} for other in others)])
        return
    for routing in measured:
        each = " and device" * (routing.loaded.model.placement.devices > 1)
        title = f"{routing.model_name}, on {routing.data}, {args.batch_size} images per batch{each}"
        print_table(report.COLUMNS, report.rows(routing), title=title)
        for line in report.remarks(routing):
            print(one_line(line))
    if compared:
        title = "Both models on the same tokens"
        print_table(report.COMPARED, report.compared_rows(compared), title=title)
    elif compared is not None:
        print("not compared: the models differ in their sparse blocks or numbers of tokens")


def _export(file: Path, routing: "MeasuredRouting", sample: "Sample") -> None:
    from vmoe.studies.routing.measure import write_routing

    with progress(f"{file}, batches", sample.steps) as advance:
        write_routing(file, routing, sample.source, on_batch=advance)
    print_messages([f"{file}: {_megabytes(file)} written"])


def _draw(folder: Path, routing: "MeasuredRouting") -> None:
    """Writes the figures; prints the time it took, and the figures that are left out."""
    from vmoe.studies.routing.figures import plots_of, write_plots

    start, names = time.perf_counter(), list(plots_of(routing.loaded.model.config))
    with progress(f"plots in {folder}", names) as advance:
        files = write_plots(routing, folder, on_plot=advance)
    seconds = time.perf_counter() - start
    print_messages([f"{folder}: {len(files)} plots drawn in {seconds:.0f} s"])
    if missing := sorted({*names} - {file.stem for file in files}):
        print_messages([f"left out, as no image has a known class: {', '.join(missing)}"])


def _write_page(args: RoutingArgs, file: Path, measured: "list[MeasuredRouting]") -> None:
    """Writes the page, and prints its size and the time it took."""
    from vmoe.studies.routing.page import count_passes, write_page

    start, how = time.perf_counter(), dict(remove=args.removals)
    with progress(f"{file}, forward passes", count_passes(measured, **how)) as advance:
        write_page(file, measured, images=args.page_images, **how, on_step=advance)
    seconds = time.perf_counter() - start
    print_messages([f"{file}: {_megabytes(file)} written in {seconds:.0f} s"])


def _megabytes(file: Path) -> str:
    return f"{file.stat().st_size / 1e6:.1f} MB"
