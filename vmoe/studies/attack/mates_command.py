"""``vmoe mates``."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import numpy as np
import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.model import StudyArgs
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.errors import UsageError, naming
from vmoe.fields import NOT_EMPTY
from vmoe.host.progress import progress
from vmoe.studies.attack.config import AttackConfig, MatesConfig

COLUMNS = ("routing", "mates", "accuracy", "changed", "loss", "dropped")
"""The columns of the table; after ± is the standard error over the victims."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatesArgs(StudyArgs):
    """Measure how far the other images of its group, its mates, change an image's prediction.

    The attacked image, the victim, stays as it is: its mates compete with it for slots. They are
    chosen, and then their pixels are changed. One device is used.

    Example: `vmoe mates --checkpoint vmoe_fashion_mnist --data fashion_mnist_sample`
    """

    epsilon: tuple[float, ...] = (64.0,)
    """Bounds on the change of a mate's pixel (L-infinity), in units of 1/255 of its range; mates
    need not look natural. One attack for each."""
    steps: int = AttackConfig.steps
    """Steps along the sign of the gradient: of 2.5 epsilon / steps, projected to changes of at most
    epsilon and to the range of pixels."""
    mates: Annotated[MatesConfig, tyro.conf.arg(name="")] = MatesConfig()


def run(argv: Sequence[str]) -> None:
    """Attacks images through their mates, and prints their accuracy."""
    args = parse(MatesArgs, "mates", argv)
    NOT_EMPTY.check(epsilon=args.epsilon)
    for name in ("capacity", "capacity_factor", "dropless", "priority"):
        if (value := getattr(args.routing, name)) is not None:
            raise UsageError("use --capacity-factor and --priority", **{f"routing.{name}": value})
    import jax

    from vmoe.data.pipeline import ORDER, check_labeled
    from vmoe.evaluate.sample import Sample
    from vmoe.nn.inputs import has_label
    from vmoe.studies.attack.mates import (
        attack_mates,
        check_mates,
        group_size,
        num_steps,
        rows,
        settings,
    )

    loaded = args.load()
    if (count := jax.local_device_count()) > 1:
        print_messages([f"1 of {count} devices is used: groups with a victim are not split"])
    with naming(loaded.origin.path):
        check_mates(loaded.model)
    changes = [AttackConfig(epsilon, steps=args.steps) for epsilon in args.epsilon]
    sample = Sample(args.data, loaded, images=args.images, batch_size=args.batch_size)
    check_labeled(sample.source)
    batches = []
    for batch in sample.batches():
        used = batch.valid & has_label(batch.labels)
        batches.append((batch.images[used], batch.labels[used]))
    images, labels = map(np.concatenate, zip(*batches, strict=True))
    print_messages(sample.messages())
    tried, size = settings(args.mates), group_size(loaded.model.config)
    steps = len(tried) * num_steps(size, args.mates, len(changes), args.batch_size)
    found: list[dict[str, Any]] = []
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
            found += rows(setting, result, labels[: args.mates.victims], changes)
    if args.json:
        print_json([{"data": sample.source.name, "order": ORDER} | row for row in found])
        return
    title = (
        f"{loaded.origin.path}, on {sample.source.name}: {args.mates.victims} victims in groups "
        f"of {size}"
    )
    print_table(COLUMNS, _texts(found), title=title)
    print(
        "worst of the draws, per victim: correct in all draws, changed in any draw, largest loss, "
        "largest share dropped; random signs, optimized: changed mates of the first draw"
    )


def _texts(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    shown = ""
    for row in rows:
        slots = ", ".join(dict.fromkeys(map(str, row["slots"].values())))
        capacity = (
            "dropless"
            if row["capacity_factor"] is None
            else f"factor {row['capacity_factor']:g}, {slots} slots"
        )
        routing = f"{capacity}, {row['priority']}" + ", image alone" * row["split"]
        mates = row["mates"] + (f", {row['epsilon']:g} / 255" if row["epsilon"] is not None else "")
        yield (
            routing if routing != shown else "",
            mates,
            f"{row['accuracy']:.1%} ± {100 * row['standard_error']:.1f}",
            f"{row['changed']:.1%}",
            f"{row['loss']:.3f}",
            f"{row['dropped']:.1%}",
        )
        shown = routing
