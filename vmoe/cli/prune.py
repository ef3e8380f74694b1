"""``vmoe prune``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.model import DeviceArgs
from vmoe.cli.printing import four_digits, print_json, print_messages, print_table
from vmoe.errors import UsageError

if TYPE_CHECKING:
    from vmoe.checkpoints import StoredModel
    from vmoe.config import ViTConfig
    from vmoe.data.reading import Reading
    from vmoe.data.sources import Source
    from vmoe.evaluate import Evaluation
    from vmoe.sharding import Placement
    from vmoe.surgery.experts import Selection


@dataclasses.dataclass(frozen=True)
class PruneArgs(DeviceArgs):
    """Remove experts of a trained model, and measure its accuracy before and after.

    A pruned model that cannot be split over --mesh is measured on another mesh, which is named.

    Example: `vmoe prune runs/digits pruned --num-experts 4`
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Trained sparse model, as for `vmoe evaluate --checkpoint`."""
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DESTINATION")]
    """New folder, or hf://OWNER/NAME."""
    num_experts: int
    """Number of experts that each MoE layer keeps; 0 with the rule average, which makes the model
    dense."""
    rule: Literal["load", "random", "router_norm", "average"] = "load"
    """Which experts to keep. load: the experts that are chosen most often on the data; random:
    random experts; router_norm: the experts whose router vectors grew most in norm since --before
    (arXiv 2405.16646). average: replace each MoE layer by an MLP, the mean of its experts."""
    before: Path | None = None
    """For router_norm: the same model before fine-tuning."""
    k: int | None = None
    """Experts per token afterwards; required if fewer experts than k are kept."""
    data: str = ""
    """NAME[:SPLIT] for loads and accuracy. If empty, the data set of the run; without a split, the
    validation split."""
    batch_size: int = 256
    """Images per batch and device."""
    seed: int = 0
    """Seed of the rule random."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    json: bool = False
    """Print one JSON object and nothing else."""

    no_effect: ClassVar[dict[str, str]] = {
        "seed": "without rule=random",
        "before": "without rule=router_norm",
        "k": "with rule=average",
    }


def run(argv: Sequence[str]) -> None:
    """Reads a sparse model, removes experts, and writes it."""
    args = parse(PruneArgs, "prune", argv)
    if args.rule == "router_norm" and args.before is None:
        raise UsageError("--rule router_norm needs --before, the model before fine-tuning")
    if (args.rule == "average") != (args.num_experts == 0):
        raise UsageError(
            f"--num-experts {args.num_experts} with --rule {args.rule}: use 0 with average, and at "
            "least 1 with any other rule"
        )
    from vmoe.checkpoints import read, write
    from vmoe.checkpoints.vmoe_format import check_empty
    from vmoe.data.pipeline import start_workers
    from vmoe.data.reading import Reading
    from vmoe.data.unreadable import Unreadable
    from vmoe.evaluate.sample import open_data
    from vmoe.factory import placement_of
    from vmoe.surgery.experts import average_experts, most_loaded, prune_experts

    check_empty(args.destination)
    stored = read(args.source, use_ema=args.use_ema)
    if not stored.config.sparse_blocks:
        raise UsageError(f"{args.source}: no block of this model is sparse")
    config = _pruned_config(args, stored)
    placements = [placement_of(stored.config, **args.devices)]
    try:
        placements.append(placement_of(config, **args.devices))
    except UsageError as error:
        if not args.mesh:
            raise
        placements.append(placement_of(config, "", args.fsdp))
        print_messages([f"the pruned model is on {placements[1]}: {error}"])
    kept = _kept_without_data(args, stored)
    source, replace = open_data(args.data, stored, split="validation")
    left_out = Unreadable("left out")
    size = args.batch_size * max(placement.devices for placement in placements)
    with start_workers(args.num_workers, source, size, stored.preprocessing) as workers:
        reading = Reading(args.batch_size, workers, on_unreadable=left_out.add if replace else None)
        before = _evaluate(stored, source, reading, placements[0])
        if args.rule == "average":
            config, params = average_experts(stored.config, stored.params)
        else:
            loads = {i: block.load for i, block in before.totals.items()}
            kept = kept or most_loaded(loads, args.num_experts)
            config, params = prune_experts(stored.config, stored.params, kept, k=args.k)
        pruned = stored._replace(config=config, params=params)
        after = _evaluate(pruned, source, reading, placements[1])
    rows = {"before": _row(stored, before), "after": _row(pruned, after)}
    print_messages(left_out.news())
    try:
        if args.json:
            print_json({"data": source.name} | rows)
        else:
            columns = ("", "experts", "parameters", "GFLOPs per image", "accuracy")
            title = f"{args.source}: {args.rule}, on {source.name}"
            print_table(columns, [(name, *_texts(row)) for name, row in rows.items()], title=title)
    finally:  # also if the reader of stdout is gone
        written = write(pruned, args.destination, format="vmoe")
    print_messages([f"{written}: {rows['after']['parameters']:,} parameters written"])


def _pruned_config(args: PruneArgs, stored: "StoredModel") -> "ViTConfig":
    """Checks the experts, their number and k before the data are read."""
    import jax

    from vmoe.surgery.experts import average_experts, prune_experts, random_experts

    configs: list[ViTConfig] = []

    def change(params: Any) -> Any:
        if args.rule == "average":
            config, params = average_experts(stored.config, params)
        else:
            some = random_experts(stored.config, args.num_experts)
            config, params = prune_experts(stored.config, params, some, k=args.k)
        configs.append(config)
        return params

    jax.eval_shape(change, stored.params)
    return configs[0]


def _kept_without_data(args: PruneArgs, stored: "StoredModel") -> "Selection | None":
    """The experts that a rule keeps, if it needs no data."""
    from vmoe.checkpoints import read
    from vmoe.surgery import experts

    if args.rule == "random":
        return experts.random_experts(stored.config, args.num_experts, seed=args.seed)
    if args.before is None:
        return None
    before = read(args.before, use_ema=args.use_ema)
    return experts.largest_router_change(
        stored.config, stored.params, before.params, args.num_experts
    )


def _evaluate(
    stored: "StoredModel", source: "Source", reading: "Reading", placement: "Placement"
) -> "Evaluation":
    import jax

    from vmoe import models
    from vmoe.evaluate import evaluate

    params = jax.device_put(stored.params, placement.params(stored.params))
    return evaluate(
        models.with_params(stored.config, params, placement=placement),
        source,
        dataclasses.replace(reading, batch_size=reading.batch_size * placement.devices),
        preprocessing=stored.preprocessing,
        loss=stored.loss,
    )


def _row(stored: "StoredModel", result: "Evaluation") -> dict[str, float | str]:
    from vmoe.costs.flops import cost

    costs = cost(stored.config)
    experts = {moe.num_experts for moe in stored.config.moe_blocks.values()}
    return {
        "experts": "/".join(map(str, sorted(experts))) or "0",
        "parameters": costs.parameters,
        "gflops_per_image": costs.flops_per_image / 1e9,
        "accuracy": result.accuracy,
        "standard_error": result.standard_error,
        "images": result.labeled,
    }


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    from vmoe.evaluate.table import with_error

    return (
        str(row["experts"]),
        f"{row['parameters']:,}",
        four_digits(row["gflops_per_image"]),
        f"{with_error(row['accuracy'], row['standard_error'])}, {row['images']:,} images",
    )
