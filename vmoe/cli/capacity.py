"""``vmoe capacity``."""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vmoe.cli.arguments import check_outputs, parse
from vmoe.cli.inference import UNITS
from vmoe.cli.printing import print_json, print_messages, print_table, progress
from vmoe.config.inference import Inference, Unit
from vmoe.errors import Failure, UsageError, naming

if TYPE_CHECKING:
    from vmoe.evaluate.capacity import Search
    from vmoe.evaluate.sample import Sample
    from vmoe.evaluate.setting_costs import Costs
    from vmoe.evaluate.setting_scores import Scores
    from vmoe.evaluate.settings import Levels, Setting
    from vmoe.factory import Loaded

ROWS = 8  # most budgets of the trade-off, beside the given one


@dataclasses.dataclass(frozen=True)
class CapacityArgs:
    """Choose k, capacity factor and priority of each sparse block within a budget of compute.

    The predictions change as little as possible: the search minimises their divergence (KL) from
    those of the model as trained. Writes inference.json into the run folder; `vmoe evaluate` and
    `vmoe predict` use it."""

    checkpoint: Path
    """Trained model, as for `vmoe evaluate --checkpoint`; its routers must be token_choice."""
    budget: str
    """Such as 0.8x: upper bound on the cost of the WHOLE model, as a fraction of its cost as
    trained. A budget that cannot be reached is refused, with the smallest that can."""
    by: Unit = "flops"
    """flops: matmuls of the forward pass, exact; time: seconds on this machine, measured."""
    data: str = ""
    """NAME[:SPLIT] to search on; the data set of the run if empty, its validation split if no split
    is named."""
    images: int = 1024
    """Number of images, a random sample of the split; at most all of them."""
    batch_size: int = 256
    """Images per batch: those of a batch may compete for slots."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    out: Path | None = None
    """File to write instead of inference.json in the run folder; needed for other checkpoints."""
    plot: Path | None = None
    """Draw the trade-off as this PNG file."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Searches a setting, prints the trade-off, and writes it."""
    args = parse(CapacityArgs, "capacity", argv)
    budget = _budget(args.budget)
    check_outputs(args, "out", "plot")
    from vmoe.data.pipeline import ORDER, check_labelled
    from vmoe.evaluate.capacity import Search
    from vmoe.evaluate.sample import Sample
    from vmoe.evaluate.setting_scores import Scores
    from vmoe.evaluate.settings import check_layers, levels_of
    from vmoe.factory import inference_file, load
    from vmoe.workdir.inference import write_inference

    loaded = load(args.checkpoint, use_ema=args.use_ema)
    with naming(loaded.origin.path):
        check_layers(loaded.model.config)
    file = args.out or inference_file(loaded.origin)
    if file is None:
        raise UsageError(f"{args.checkpoint} is no run folder: name the file to write with --out")
    levels = levels_of(loaded.model.config)
    sample = Sample(
        args.data, loaded, images=args.images, batch_size=args.batch_size, split="validation"
    )
    check_labelled(sample.source)
    costs = _costs(args, loaded, levels, sample)
    costs.check(budget)
    about = 2 * sum(len(level) for of_block in levels for level in of_block)
    with progress(f"searching on {sample.source.name}", about) as advance:
        scores = Scores(loaded.model, sample.batches(), levels, on_step=advance)
        search = Search(scores, costs, levels)
        rows = [_row(search, scores, costs, each) for each in _budgets(costs.least, budget)]
    (chosen,) = (row for row in rows if row["budget"] == budget)
    report = {
        "file": str(file),
        "data": sample.source.name,
        "order": ORDER,
        "by": args.by,
        "accuracy_trained": scores.trained,
        "budget": budget,
        "blocks": dict(zip(loaded.model.config.sparse_blocks, chosen["setting"], strict=True)),
        "trade_off": rows,
    }
    if args.by == "time":
        report["measured"] = _measured(loaded, chosen, sample)
    print_messages(sample.messages())
    with contextlib.ExitStack() as files:  # each is written, whatever else cannot be
        if args.plot:
            files.callback(_plot, args, rows, chosen, scores, sample.source.name)
        files.callback(write_inference, file, _inference(args, loaded, sample, scores, chosen))
        if args.json:
            print_json(_plain(report))
        else:
            _print(report, loaded)


def _budget(text: str) -> float:
    """The fraction of a budget such as 0.6x."""
    try:
        budget = float(text.removesuffix("x"))
    except ValueError:
        budget = 0.0
    if not 0 < budget <= 1:
        raise UsageError(
            "use a fraction of the cost of the model as trained, in (0, 1], as 0.8x", budget=text
        )
    return budget


def _budgets(least: float, budget: float) -> list[float]:
    """The budgets of the trade-off, descending: multiples of 0.05 or 0.1, and the given one."""
    step = 5 if 1 - least <= 0.05 * ROWS else 10
    every = {percent / 100 for percent in range(step, 101, step) if percent / 100 >= least}
    return sorted(every | {budget}, reverse=True)


def _costs(
    args: CapacityArgs, loaded: "Loaded", levels: "Sequence[Levels]", sample: "Sample"
) -> "Costs":
    from vmoe.evaluate.setting_costs import flops_costs, time_costs

    if args.by == "flops":
        return flops_costs(loaded.model.config, levels)
    images, _, _ = next(sample.batches())
    with progress("timing", len(loaded.model.config.sparse_blocks)) as advance:
        return time_costs(loaded.model, levels, images, on_step=advance)


def _measured(loaded: "Loaded", chosen: dict[str, Any], sample: "Sample") -> float:
    from vmoe.evaluate.setting_costs import time_ratio

    images, _, _ = next(sample.batches())
    return time_ratio(loaded.model, chosen["setting"], images)


def _row(search: "Search", scores: "Scores", costs: "Costs", budget: float) -> dict[str, Any]:
    setting, even = search.best(budget), search.even(budget)
    return (
        {"budget": budget}
        | _result("", setting, scores, costs)
        | _result("_even", even, scores, costs)
    )


def _result(
    suffix: str, setting: "Setting | None", scores: "Scores", costs: "Costs"
) -> dict[str, Any]:
    """The setting, its cost and its accuracy; None for each if there is none."""
    cost = None if setting is None else costs.of(setting)
    accuracy = None if setting is None else scores.of(setting).accuracy
    return {f"setting{suffix}": setting, f"cost{suffix}": cost, f"accuracy{suffix}": accuracy}


def _inference(
    args: CapacityArgs, loaded: "Loaded", sample: "Sample", scores: "Scores", row: dict[str, Any]
) -> Inference:
    from vmoe.data.pipeline import ORDER

    return Inference(
        blocks=dict(zip(loaded.model.config.sparse_blocks, row["setting"], strict=True)),
        by=args.by,
        budget=row["budget"],
        cost=row["cost"],
        data=sample.source.name,
        images=scores.images,
        batch_size=args.batch_size,
        step=loaded.step,
        accuracy=row["accuracy"],
        accuracy_even=row["accuracy_even"],
        accuracy_trained=scores.trained,
        order=ORDER,
    )


def _plot(
    args: CapacityArgs,
    rows: list[dict[str, Any]],
    chosen: dict[str, Any],
    scores: "Scores",
    data: str,
) -> None:
    from vmoe.evaluate.capacity_plot import TradeOff, plot_trade_off

    assert args.plot is not None
    trade_off = TradeOff(
        searched=[(row["cost"], row["accuracy"]) for row in rows],
        even=[(row["cost_even"], row["accuracy_even"]) for row in rows if row["setting_even"]],
        trained=scores.trained,
        chosen=(chosen["cost"], chosen["accuracy"]),
    )
    cost = f"{UNITS[args.by]} per image"
    try:
        plot_trade_off(trade_off, args.plot, cost=cost, data=data)
    except (OSError, ValueError) as error:  # ValueError: no such format of images
        raise Failure(f"{args.plot}: cannot be written ({error})") from None


def _plain(report: dict[str, Any]) -> dict[str, Any]:
    """The report without dataclasses: settings as dicts."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return dataclasses.asdict(value)
        if isinstance(value, dict):
            return {name: plain(each) for name, each in value.items()}
        return [plain(each) for each in value] if isinstance(value, list | tuple) else value

    return plain(report)


def _print(report: dict[str, Any], loaded: "Loaded") -> None:
    by = UNITS[report["by"]]
    step = "" if loaded.step is None else f", step {loaded.step}"
    title = (
        f"{loaded.origin.path}{step}, on {report['data']}: {report['accuracy_trained']:.2%} as "
        f"trained. Accuracy within budgets of the {by}"
    )
    setting = "even: k, capacity factor, priority"
    columns = ("budget", "searched", "cost", "even", "cost", setting)
    print_table(columns, [_texts(row) for row in report["trade_off"]], title=title)
    columns = ("block", "k", "capacity factor", "priority")
    rows = [(str(block), *_setting(own)) for block, own in report["blocks"].items()]
    print_table(columns, rows, title=f"chosen for {report['budget']:g}x: {report['file']}")
    if "measured" in report:
        print(f"measured with it: {report['measured']:.3f}x the time of the model as trained")


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    searched = (f"{row['budget']:g}x", f"{row['accuracy']:.2%}", f"{row['cost']:.3f}x")
    if row["setting_even"] is None:
        return (*searched, "-", "-", "-")
    even = (f"{row['accuracy_even']:.2%}", f"{row['cost_even']:.3f}x")
    return (*searched, *even, ", ".join(_setting(row["setting_even"][0])))


def _setting(own: Any) -> tuple[str, ...]:
    return str(own.k), f"{own.capacity_factor:g}", own.priority
