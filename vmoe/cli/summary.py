"""``vmoe summary``."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_json
from vmoe.config import ViTConfig


@dataclasses.dataclass(frozen=True)
class SummaryArgs:
    """Show the parameters and FLOPs of a named model. Options change fields of its config.

    Example: `vmoe summary vmoe_b16_every2_e8 --num-classes 100`
    """

    name: tyro.conf.Positional[str]
    """Name of a model, as listed by `vmoe models`."""
    model: Annotated[ViTConfig, tyro.conf.arg(name="")]
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Prints the parts of a model and their costs."""
    from vmoe.models import MODELS, model_config

    name = next((word for word in argv if word in MODELS), None)
    default = model_config(name) if name else ViTConfig()
    args = parse(SummaryArgs, "summary", argv, model=default)
    changed = {name: x for name, x in vars(args.model).items() if x != getattr(default, name)}
    model = model_config(args.name, **changed)  # its head bias can depend on the other fields
    from vmoe.costs.flops import cost
    from vmoe.costs.summary import summarize

    if args.json:
        costs = dataclasses.asdict(cost(model))
        print_json({"name": args.name} | costs | dataclasses.asdict(model))
    else:
        print(summarize(model, title=args.name))
