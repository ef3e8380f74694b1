"""``vmoe attack --target mates``."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from vmoe.cli.printing import print_json, print_messages, print_table, progress
from vmoe.errors import UsageError, naming

if TYPE_CHECKING:
    from vmoe.cli.attack import AttackArgs
    from vmoe.config.attack import AttackConfig
    from vmoe.evaluate.mates_outcomes import MatesResult, Setting

COLUMNS = ("routing", "mates", "accuracy", "changed", "loss", "dropped")


def run(args: "AttackArgs") -> None:
    """Attacks images through the others of their groups, and prints what that does to them."""
    _check(args)
    from vmoe.data.pipeline import ORDER, check_labelled
    from vmoe.evaluate.batch_mates import attack_mates, check_mates, group_size, num_steps
    from vmoe.evaluate.mates_outcomes import settings
    from vmoe.evaluate.sample import Sample
    from vmoe.factory import load
    from vmoe.nn.inputs import has_label

    loaded = load(args.checkpoint, routing=args.routing, use_ema=args.use_ema)
    with naming(loaded.origin.path):
        check_mates(loaded.model)
    changes = args.configs(64.0)
    sample = Sample(args.data, loaded, images=args.images, batch_size=args.batch_size)
    check_labelled(sample.source)
    batches = []
    for images, labels, valid in sample.batches():
        used = valid & has_label(labels)
        batches.append((images[used], labels[used]))
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    print_messages(sample.messages())
    tried, size = settings(args.mates), group_size(loaded.model.config)
    steps = len(tried) * num_steps(size, args.mates, len(changes), args.batch_size)
    rows: list[dict[str, Any]] = []
    with progress(f"attacking {loaded.origin.path}", steps) as advance:
        for setting in tried:
            result = attack_mates(
                loaded.model,
                images,
                labels,
                setting,
                args.mates,
                changes,
                batch_size=args.batch_size,
                on_step=advance,
            )
            rows += _rows(setting, result, labels[: args.mates.victims], changes)
    if args.json:
        print_json([{"data": sample.source.name, "order": ORDER} | row for row in rows])
        return
    title = (
        f"{loaded.origin.path}, on {sample.source.name}: {args.mates.victims} victims in groups "
        f"of {size}"
    )
    print_table(COLUMNS, _texts(rows), title=title)
    print(
        "worst of the draws: right in all of them, changed in any, largest loss and drop; the two "
        "last rows start from the first draw"
    )


def _check(args: "AttackArgs") -> None:
    """Refuses settings of the routing that mates have options of their own for."""
    for name in ("capacity", "capacity_factor", "dropless", "priority"):
        if (value := getattr(args.routing, name)) is not None:
            raise UsageError(
                "use --mates.capacity-factor and --mates.priority",
                **{f"routing.{name}": value, "target": "mates"},
            )


def _rows(
    setting: "Setting", result: "MatesResult", labels: np.ndarray, changes: "list[AttackConfig]"
) -> Iterator[dict[str, Any]]:
    """One row for each way to choose the mates."""
    from vmoe.evaluate.mates_outcomes import Outcome, measures

    first = Outcome(*(x[:, 0] for x in result.drawn))
    ways = [
        ("none", None, result.without, False),
        ("mean of the draws", None, result.drawn, False),
        ("worst of the draws", None, result.drawn, True),
        ("first draw", None, first, False),
    ]
    for change, changed in zip(changes, result.changed, strict=True):
        ways += [
            ("random signs", change.epsilon, changed.control, False),
            ("optimised", change.epsilon, changed.optimised, False),
        ]
    for mates, epsilon, outcome, worst in ways:
        yield {
            **setting._asdict(),
            "slots": {str(i): slots for i, slots in result.slots.items()},
            "mates": mates,
            "epsilon": epsilon,
            **measures(outcome, result.without, labels, worst=worst)._asdict(),
        }


def _texts(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    shown = ""
    for row in rows:
        slots = ", ".join(dict.fromkeys(map(str, row["slots"].values())))
        capacity = (
            "every token"
            if row["capacity_factor"] is None
            else f"factor {row['capacity_factor']:g}, {slots} slots"
        )
        routing = f"{capacity}, {row['priority']}" + ", image alone" * row["split"]
        mates = row["mates"] + (f", {row['epsilon']:g} / 255" if row["epsilon"] is not None else "")
        yield (
            routing if routing != shown else "",
            mates,
            f"{row['accuracy']:.1%}",
            f"{row['changed']:.1%}",
            f"{row['loss']:.3f}",
            f"{row['dropped']:.1%}",
        )
        shown = routing
