"""``vmoe capacity``."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe.cli.arguments import check_outputs, parse
from vmoe.cli.model import UNITS, DeviceArgs
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.config.routing_file import RoutingFile, Unit
from vmoe.errors import Failure, UsageError, naming
from vmoe.host.progress import progress

if TYPE_CHECKING:
    from vmoe.evaluate.sample import Sample
    from vmoe.factory import Loaded
    from vmoe.studies.capacity.scores import Scores

ROWS = 8  # largest number of budgets in the trade-off, without the given one


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapacityArgs(DeviceArgs):
    """Search k, capacity factor and priority per block within a budget of compute.

    The search minimizes the KL divergence from the predictions of the model as trained. It writes
    routing.json into the run folder; `vmoe evaluate` and `vmoe predict` use that file.

    Example: `vmoe capacity --checkpoint runs/digits --budget 0.9x`
    """

    checkpoint: Path
    """Trained model, as for `vmoe evaluate --checkpoint`; its routers must have
    a k and a priority."""
    budget: str
    """Upper bound on the cost of the WHOLE model as a fraction of its cost as trained, such as
    0.8x. If it cannot be reached, the error message has the smallest budget that can."""
    by: Unit = "flops"
    """flops: matmuls of the forward pass, exact; time: seconds on this machine, measured."""
    data: str = ""
    """NAME[:SPLIT] to search on; the data set of the run if empty, its validation split if no split
    is named."""
    images: int = 1024
    """Number of images, a random sample of the split; at most all of them."""
    batch_size: int = 256
    """Images per batch and device; only images of one batch on one device can compete for slots."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    out: Path | None = None
    """File to write instead of routing.json in the run folder; required without a run folder."""
    plot: Path | None = None
    """Draw the trade-off as this PNG file."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Searches a setting, prints the trade-off, and writes it."""
    args = parse(CapacityArgs, "capacity", argv)
    budget = _budget(args.budget)
    check_outputs(args, "out", "plot")
    from vmoe.data.pipeline import ORDER, check_labeled
    from vmoe.evaluate.sample import Sample
    from vmoe.factory import load, routing_file_of
    from vmoe.studies.capacity.costs import time_ratio
    from vmoe.studies.capacity.settings import check_layers

    loaded = load(args.checkpoint, use_ema=args.use_ema, **args.devices)
    with naming(loaded.origin.path):
        check_layers(loaded.model.config)
    file = args.out or routing_file_of(loaded.origin)
    if file is None:
        raise UsageError(f"{args.checkpoint} is not a run folder: give a file to write with --out")
    sample = Sample(
        args.data, loaded, images=args.images, batch_size=args.batch_size, split="validation"
    )
    check_labeled(sample.source)
    with sample.start_workers(args.num_workers):
        scores, rows = _search(args.by, budget, loaded, sample)
    (row,) = (row for row in rows if row["budget"] == budget)
    chosen = RoutingFile(
        blocks=dict(zip(loaded.model.config.sparse_blocks, row["setting"], strict=True)),
        by=args.by,
        budget=budget,
        cost=row["cost"],
        data=sample.source.name,
        images=scores.images,
        batch_size=args.batch_size,
        step=loaded.step,
        accuracy=row["accuracy"],
        accuracy_uniform=row["accuracy_uniform"],
        accuracy_trained=scores.trained,
        order=ORDER,
    )
    report = {
        "file": str(file),
        "data": sample.source.name,
        "order": ORDER,
        "by": args.by,
        "accuracy_trained": scores.trained,
        "budget": budget,
        "blocks": chosen.blocks,
        "trade_off": rows,
    }
    if args.by == "time":
        batch = next(sample.batches()).images
        report["measured"] = time_ratio(loaded.model, row["setting"], batch)
    print_messages(sample.messages())
    with contextlib.ExitStack() as files:  # all are written, even if writing one of them fails
        if args.plot:
            files.callback(_plot, args.plot, rows, chosen)
        files.callback(_write, file, chosen)
        if args.json:
            print_json(report)
        else:
            _print(report, loaded)


def _search(
    by: Unit, budget: float, loaded: "Loaded", sample: "Sample"
) -> "tuple[Scores, list[dict[str, Any]]]":
    """The scores, and a row for each budget of the trade-off."""
    from vmoe.studies.capacity.costs import flops_costs, time_costs
    from vmoe.studies.capacity.scores import Scores
    from vmoe.studies.capacity.search import Search
    from vmoe.studies.capacity.settings import levels_of

    model, config = loaded.model, loaded.counted_config
    levels = levels_of(config)
    if by == "flops":
        costs = flops_costs(config, levels)
    else:
        with progress("timing", len(levels)) as advance:
            costs = time_costs(model, levels, next(sample.batches()).images, on_step=advance)
    costs.check(budget)
    about = 2 * sum(len(level) for of_block in levels for level in of_block)
    what = f"searching on {sample.source.name}, images read by {sample.workers}"
    with progress(what, about) as advance:
        scores = Scores(model, sample.batches(), levels, on_step=advance)
        search = Search(scores, costs, levels)
        return scores, [search.row(each) for each in _budgets(costs.least, budget)]


def _budget(text: str) -> float:
    """The fraction of a budget such as 0.6x."""
    try:
        budget = float(text.removesuffix("x"))
    except ValueError:
        budget = 0.0
    if not 0 < budget <= 1:
        raise UsageError(
            "use a fraction in (0, 1] of the cost of the model as trained, such as 0.8x",
            budget=text,
        )
    return budget


def _budgets(least: float, budget: float) -> list[float]:
    """The budgets of the trade-off, descending: multiples of 0.05 or 0.1, and the given one."""
    step = 5 if 1 - least <= 0.05 * ROWS else 10
    every = {percent / 100 for percent in range(step, 101, step) if percent / 100 >= least}
    return sorted(every | {budget}, reverse=True)


def _plot(path: Path, rows: list[dict[str, Any]], chosen: RoutingFile) -> None:
    """Draws the accuracy of per-block and uniform routing by cost."""
    from matplotlib.figure import Figure

    from vmoe.workdir.layout import replacing

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    # Two colors of Okabe and Ito's palette, and a shape and a line style for each curve.
    for label, suffix, color, style in (
        ("per-block routing", "", "#0072B2", "o-"),
        ("uniform routing", "_uniform", "#D55E00", "s--"),
    ):
        points = [row for row in rows if row[f"setting{suffix}"]]
        x = [row[f"cost{suffix}"] for row in points]
        percent = [100 * row[f"accuracy{suffix}"] for row in points]
        axes.plot(x, percent, style, color=color, label=label, markersize=5)
    axes.plot(1.0, 100 * chosen.accuracy_trained, "k*", markersize=12, label="as trained")
    ring = dict(markersize=13, markerfacecolor="none", markeredgecolor="black")
    axes.plot(chosen.cost, 100 * chosen.accuracy, "o", **ring, label="chosen")
    axes.set_xlabel(f"{UNITS[chosen.by]} per image (1 = as trained)")
    axes.set_ylabel("accuracy (%)")
    axes.set_title(chosen.data, fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="lower right")
    try:
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=150)
    except (OSError, ValueError) as error:  # ValueError: no such format of images
        raise Failure(f"{path}: cannot be written ({error})") from None
    print_messages([f"{path}: trade-off drawn"])


def _write(file: Path, chosen: RoutingFile) -> None:
    from vmoe.workdir.routing_file import write_routing_file

    write_routing_file(file, chosen)
    blocks = f"{len(chosen.blocks)} block{'s' * (len(chosen.blocks) > 1)}"
    print_messages([f"{file}: routing of {blocks} written"])


def _print(report: dict[str, Any], loaded: "Loaded") -> None:
    by = UNITS[report["by"]]
    step = "" if loaded.step is None else f", step {loaded.step}"
    title = (
        f"{loaded.origin.path}{step}, on {report['data']}: {report['accuracy_trained']:.2%} as "
        f"trained. Accuracy within budgets of the {by}"
    )
    setting = "uniform: k, capacity factor, priority"
    columns = ("budget", "per-block", "cost", "uniform", "cost", setting)
    print_table(columns, [_texts(row) for row in report["trade_off"]], title=title)
    columns = ("block", "k", "capacity factor", "priority")
    rows = [(str(block), *_setting(own)) for block, own in report["blocks"].items()]
    print_table(columns, rows, title=f"chosen for {report['budget']:g}x: {report['file']}")
    if "measured" in report:
        print(f"measured: {report['measured']:.3f}x the time of the model as trained")


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    per_block = (f"{row['budget']:g}x", f"{row['accuracy']:.2%}", f"{row['cost']:.3f}x")
    if row["setting_uniform"] is None:
        return (*per_block, "-", "-", "-")
    uniform = (f"{row['accuracy_uniform']:.2%}", f"{row['cost_uniform']:.3f}x")
    return (*per_block, *uniform, ", ".join(_setting(row["setting_uniform"][0])))


def _setting(own: Any) -> tuple[str, ...]:
    return str(own.k), f"{own.capacity_factor:g}", own.priority
