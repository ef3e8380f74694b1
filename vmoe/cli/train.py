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
    init: str = ""
    """Trained model whose parameters a new run starts from, as for `vmoe evaluate --checkpoint`.
    The head is new if the number of classes differs; positions are resampled."""
    init_new_head: bool = False
    """Start with a new head even if the number of classes is the same."""
    init_partial: bool = False
    """Accept that other parameters are new, or dropped; all are reported."""
    mesh: str = ""
    """Devices per mesh axis, such as data=4,expert=8: experts are sharded over the expert axis and
    replicated over the data axis. If empty, chosen to fit the model and the devices."""
    fsdp: bool = False
    """Also shard dense parameters and the optimiser state over the data axis."""
    distributed: bool = False
    """Run as one of several processes, all started with the same command. JAX detects the cluster;
    elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID."""
    on_nan: Literal["stop", "rewind"] = "stop"
    """If the loss or the gradient is NaN or infinite: stop the run; or rewind to the newest
    checkpoint and skip the batches that led there."""
    max_rewinds: int = 3
    """Maximum number of rewinds in a run."""


def run(argv: Sequence[str]) -> None:
    """Trains a model, and prints the final evaluations."""
    args = parse_with_config(TrainArgs, "train", argv)
    from vmoe import distributed
    from vmoe.train import InitFrom, train

    init = InitFrom(args.init, args.init_new_head, args.init_partial) if args.init else None
    if args.distributed:
        distributed.initialize()
    with distributed.abort_on_error():
        evaluations = train(
            args.run,
            args.workdir,
            init=init,
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
