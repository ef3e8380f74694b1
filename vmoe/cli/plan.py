"""``vmoe plan``."""

import dataclasses
import textwrap
from collections.abc import Sequence

from vmoe.cli.arguments import RunArgs, parse_with_config
from vmoe.cli.printing import print_json, print_table


@dataclasses.dataclass(frozen=True)
class PlanArgs(RunArgs):
    """Estimate what a run needs on hypothetical devices: memory, communication, step time.

    Example: `vmoe plan --config jft_b16 --devices 8`
    """

    devices: int
    """Number of devices, as JAX counts them."""
    mesh: str = ""
    """Devices per mesh axis, such as data=4,expert=8. If empty, every mesh that fits the model and
    the devices."""
    chip: str = "h100"
    """Chip, whose published peak rates are used: tpu_v3, tpu_v4, tpu_v5e, tpu_v5p, a100, h100 or
    h200."""
    device_memory: str = ""
    """Memory of one device, such as 80GB or 80GiB; if empty, the memory of the chip."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Prints the estimate and its assumptions."""
    args = parse_with_config(PlanArgs, "plan", argv)
    from vmoe.plan import table
    from vmoe.plan.candidates import plan

    estimate = plan(
        args.run, args.devices, mesh=args.mesh, chip=args.chip, device_memory=args.device_memory
    )
    if args.json:
        print_json(table.to_dict(estimate))
        return
    print("\n".join(table.heading(estimate)))
    for title, columns, rows in table.tables(estimate):
        print_table(columns, rows, title=f"\n{title}")
    print("\nAssumptions:")
    for line in table.assumptions(estimate):
        print(textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  "))
