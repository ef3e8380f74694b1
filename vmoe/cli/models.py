"""``vmoe models``."""

import dataclasses
from collections.abc import Sequence

import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.printing import four_digits, print_json, print_table
from vmoe.errors import UsageError


@dataclasses.dataclass(frozen=True)
class ModelsArgs:
    """List named models: parameters, active parameters per token, FLOPs per image.

    Example: `vmoe models 'vmoe_b*'`
    """

    pattern: tyro.conf.Positional[str] = "*"
    """Pattern with wildcards, such as 'vmoe_*'."""
    pretrained: bool = False
    """List trained weights instead: their size, training and accuracies."""
    json: bool = False
    """Print one JSON list and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Prints the named models and their costs."""
    args = parse(ModelsArgs, "models", argv)
    if args.pretrained:
        _pretrained(args)
        return
    from vmoe.costs.flops import cost
    from vmoe.models import hub_remedy, list_models, model_config

    names = list_models(args.pattern)
    if not names:
        remedy = hub_remedy(args.pattern) or "`vmoe models` lists all"
        raise UsageError(f"no model matches {args.pattern!r}; {remedy}")
    costs = {name: cost(model_config(name)) for name in names}
    if args.json:
        print_json([{"name": name} | dataclasses.asdict(one) for name, one in costs.items()])
        return
    rows = [
        (
            name,
            f"{one.parameters:,}",
            f"{one.active_parameters:,.0f}",
            four_digits(one.flops_per_image / 1e9),
        )
        for name, one in costs.items()
    ]
    print_table(("model", "parameters", "active per token", "GFLOPs per image"), rows)


def _pretrained(args: ModelsArgs) -> None:
    from vmoe.factory import list_models
    from vmoe.models import hub_remedy
    from vmoe.zoo import ENTRIES

    names = set(list_models(args.pattern, pretrained=True))
    entries = [entry for entry in ENTRIES if entry.name in names]
    if not entries:
        remedy = hub_remedy(args.pattern) or "`vmoe models --pretrained` lists all"
        raise UsageError(f"no weights match {args.pattern!r}; {remedy}")
    if args.json:
        fields = ("name", "path", "nbytes", "training", "measured_by")
        print_json(
            [
                {field: getattr(entry, field) for field in fields}
                | {"accuracies": {**entry.accuracies}}
                | {"capacity_factor": entry.capacity_factor}
                for entry in entries
            ]
        )
        return
    for entry in entries:
        size = entry.nbytes / 1e6
        print(f"{entry.name}  {size:,.{0 if size >= 10 else 1}f} MB")
        print(f"    {entry.path}")
        print(f"    training: {entry.training}")
        values = ", ".join(f"{data} {value}%" for data, value in entry.accuracies.items())
        accuracy = f"{values} (measured by {entry.measured_by})" if values else "not published"
        print(f"    accuracy: {accuracy}")
        if entry.capacity_factor:
            print(f"    capacity factor: {entry.capacity_factor}, {entry.capacity_source}")
