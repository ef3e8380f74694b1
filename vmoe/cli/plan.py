"""``vmoe plan``."""

import dataclasses
import textwrap
from collections.abc import Mapping, Sequence

from vmoe.cli.arguments import RunArgs, given, parse_with_config
from vmoe.cli.printing import print_json, print_table
from vmoe.errors import UsageError, require


@dataclasses.dataclass(frozen=True)
class PlanArgs(RunArgs):
    """Estimate what a run needs on devices that you do not have, or compile it for them.

    Example: `vmoe plan --config jft_b16 --devices 8`
    """

    devices: int | None = None
    """Number of devices, as JAX counts them."""
    mesh: str = ""
    """Devices per mesh axis, as for `vmoe train`, such as data=4,expert=8. If empty, every mesh
    that fits the model and the devices; with --compile the one that training would take."""
    chip: str = "h100"
    """Chip, whose published peak rates are used: tpu_v3, tpu_v4, tpu_v5e, tpu_v5p, a100, h100 or
    h200."""
    device_memory: str = ""
    """Memory of one device, such as 80GB or 80GiB; if empty, the memory of the chip."""
    compile: str = ""
    """Instead of an estimate, compile the training step and the forward pass for a machine, which
    this one does not have, and show what its compiler made of them: tpu:v5e:4x8 (any topology of
    TPUs), gpu:h100, or gpu:h100:8 (a100, h100, h200, b200). Takes minutes; needs the extra
    compilers."""
    fsdp: bool = False
    """With --compile: shard large dense parameters and the optimizer state over the mesh axis
    data. An estimate shows both."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Prints the estimate and its assumptions, or what a compiler made of the run."""
    args = parse_with_config(PlanArgs, "plan", argv)
    if args.compile:
        _compile(args, given(argv))
    else:
        _estimate(args)


def _estimate(args: PlanArgs) -> None:
    from vmoe.plan import table
    from vmoe.plan.candidates import plan

    if args.devices is None:
        raise UsageError("give the number of devices, or --compile")
    require(not args.fsdp, "only --compile takes it; an estimate shows both", fsdp=True)
    estimate = plan(
        args.run, args.devices, mesh=args.mesh, chip=args.chip, device_memory=args.device_memory
    )
    if args.json:
        print_json(table.to_dict(estimate))
        return
    _print(table.heading(estimate), table.tables(estimate))
    print("\nAssumptions:")
    for line in table.assumptions(estimate):
        print(textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  "))


def _compile(args: PlanArgs, options: Mapping[str, str | None]) -> None:
    from vmoe.plan import report
    from vmoe.plan.compiled import compile_run
    from vmoe.plan.targets import target

    for option in ("--devices", "--chip", "--device-memory"):
        name = option.strip("-").replace("-", "_")
        problem = "leave it out: the machine of --compile has its own"
        require(option not in options, problem, **{name: options.get(option)})
    machine = target(args.compile)  # before JAX starts
    result = compile_run(args.run, machine, mesh=args.mesh, fsdp=args.fsdp)
    if args.json:
        print_json(report.to_dict(result))
    else:
        _print(report.heading(result), report.tables(result))
        print("\n".join(["", *report.notes(result)]))
    report.check_fits(result)


def _print(
    heading: Sequence[str], tables: Sequence[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]
) -> None:
    print("\n".join(heading))
    for title, columns, rows in tables:
        print_table(columns, rows, title=f"\n{title}")
