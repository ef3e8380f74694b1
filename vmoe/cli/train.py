"""``vmoe train``."""

import contextlib
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal, TextIO, cast

import tyro

from vmoe.cli.arguments import RunArgs, given, parse_with_config
from vmoe.config.dry_run import dry_run
from vmoe.errors import UsageError
from vmoe.host.signals import temporary_folder
from vmoe.host.streams import LossyStream


@dataclasses.dataclass(frozen=True)
class TrainArgs(RunArgs):
    """Train a model. Run the same command again to resume.

    Example: `vmoe train --config digits --workdir runs/digits`
    """

    workdir: Path
    """Run folder: config, metrics, checkpoints."""
    dry_run: bool = False
    """Try the config in about a minute: 2 steps on 8 synthetic images or 4 for each device, with
    one dense and one sparse block, at most 4 experts or one for each device, and at most 100
    classes, in one process. It needs no workdir, and keeps no files."""
    init: str = ""
    """Start a new run from the parameters of this trained model, as for `vmoe evaluate
    --checkpoint`. The head is new if the number of classes differs; positions are resampled."""
    init_new_head: bool = False
    """Start with a new head even if the number of classes is the same."""
    init_partial: bool = False
    """Load what fits: allow missing and unused parameters. Each of them is reported."""
    mesh: str = ""
    """Devices per mesh axis, such as data=4,expert=8: experts are sharded over the expert axis and
    replicated over the data axis. With expert=2x8, 2 hosts of 8 devices, slots and rows are sent
    inside each host, then between hosts. If empty, a mesh that fits the model and the devices."""
    fsdp: bool = False
    """Also shard dense parameters and the optimizer state over the data axis."""
    distributed: bool = False
    """Run as one of several processes, which are all started with the same command. JAX detects
    SLURM, Open MPI and TPU pods; elsewhere set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID."""
    on_nan: Literal["stop", "rewind"] = "stop"
    """If the loss or the gradient is NaN or infinite. stop: end the run; rewind: go back to the
    newest scheduled checkpoint, and skip the batches since then."""
    max_rewinds: int = 3
    """Maximum number of rewinds in a run."""
    profile: str = ""
    """Trace these steps for a profiler, such as 10:15, once in a run."""
    wandb: Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[PROJECT]")] = None
    """Also log to Weights & Biases. Default project: the project of the run, WANDB_PROJECT, or
    vmoe."""

    no_effect: ClassVar[dict[str, str]] = {
        "init": "with dry_run",
        "wandb": "with dry_run",
        "distributed": "with dry_run",
        "profile": "with dry_run",
        "init_new_head": "without init",
        "init_partial": "without init",
        "max_rewinds": "without on_nan=rewind",
    }


def run(argv: Sequence[str]) -> None:
    """Trains a model, and prints the final evaluations."""
    with contextlib.ExitStack() as stack:
        if "--dry-run" in given(argv):
            folder = stack.enter_context(temporary_folder())
            argv = [*argv, "--workdir", str(folder)]
        args = parse_with_config(TrainArgs, "train", argv)
        if args.wandb and len(args.wandb) > 1:
            raise UsageError("give one project", wandb=" ".join(args.wandb))
        _train(args)


def _train(args: TrainArgs) -> None:
    import jax

    from vmoe import distributed
    from vmoe.train import InitFrom, train
    from vmoe.workdir.layout import read_config

    init = InitFrom(args.init, args.init_new_head, args.init_partial) if args.init else None
    if args.distributed:
        distributed.initialize()
    with distributed.abort_on_error():
        evaluations = train(
            dry_run(args.run, jax.device_count()) if args.dry_run else args.run,
            args.workdir,
            init=init,
            mesh=args.mesh,
            fsdp=args.fsdp,
            on_nan=args.on_nan,
            max_rewinds=args.max_rewinds,
            profile=args.profile,
            wandb=None if args.wandb is None else "".join(args.wandb),
        )
    if not distributed.is_primary():
        return
    run = "dry run" if args.dry_run else args.workdir
    steps = read_config(args.workdir).steps  # resolved, where the argument is in epochs or images
    sys.stdout = cast(TextIO, LossyStream(sys.stdout))  # the run is done, whoever reads this
    for name, weights, result in evaluations:
        average = " (moving average)" if weights == "ema" else ""
        print(
            f"{run}: {steps} steps, {name} accuracy {result.accuracy:.2%} on {result.labeled} "
            f"images{average}"
        )
