"""``vmoe train``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from vmoe.cli.arguments import RunArgs, parse_with_config


@dataclasses.dataclass(frozen=True)
class TrainArgs(RunArgs):
    """Train a model. Run the same command again to resume."""

    workdir: Path
    """Run folder: config, metrics, checkpoints."""
    mesh: str = ""
    """Devices by axis, data=4,expert=8: experts are split over the expert axis and replicated over
    the data axis. If empty, chosen by the model and the devices."""
    fsdp: bool = False
    """Split dense parameters and the optimiser state over the data axis as well."""
    distributed: bool = False
    """This is one of several processes of the run, all started with the same command. A cluster
    that JAX detects numbers them, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID do."""
    on_nan: Literal["stop", "rewind"] = "stop"
    """If the loss or the gradient is NaN or infinite: stop the run; or rewind to the newest
    checkpoint and skip the batches that led there."""
    max_rewinds: int = 3
    """Most rewinds of a run."""


def run(argv: Sequence[str]) -> None:
    """Trains, and prints the last evaluations."""
    args = parse_with_config(TrainArgs, "train", argv)
    from vmoe import distributed
    from vmoe.train.loop import train

    if args.distributed:
        distributed.initialize()
    with distributed.abort_on_error():
        evaluations = train(
            args.run,
            args.workdir,
            mesh=args.mesh,
            fsdp=args.fsdp,
            on_nan=args.on_nan,
            max_rewinds=args.max_rewinds,
        )
    if not distributed.is_primary():
        return
    for name, weights, result in evaluations:
        average = " (moving average)" if weights == "ema" else ""
        print(
            f"{args.workdir}: {args.run.steps} steps, {name} accuracy {result.accuracy:.2%} on "
            f"{result.images} images{average}"
        )
