"""``vmoe attack``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.model import DeviceArgs, StudyArgs
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.errors import naming
from vmoe.fields import NOT_EMPTY
from vmoe.host.progress import progress
from vmoe.studies.attack.config import AttackConfig, AttackMethod

if TYPE_CHECKING:
    from vmoe.factory import Loaded

COLUMNS = ("model", "epsilon / 255", "accuracy before", "after", "changed", "loss after", "overlap")
"""The columns of the table; after ± is the standard error over the images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttackArgs(DeviceArgs, StudyArgs):
    """Measure how robust predictions and routing are to adversarial changes of images.

    Example: `vmoe attack --checkpoint vmoe_fashion_mnist --data fashion_mnist_sample`
    """

    compare: Path | None = None
    """Another model to attack in the same way, such as a dense one, with its own routing."""
    epsilon: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    """Bounds on the change of a pixel (L-infinity), in units of 1/255 of its range; one attack for
    each."""
    method: Annotated[AttackMethod, tyro.conf.arg(name="")] = AttackMethod()


def run(argv: Sequence[str]) -> None:
    """Attacks trained models, and prints their accuracy before and after."""
    args = parse(AttackArgs, "attack", argv)
    NOT_EMPTY.check(epsilon=args.epsilon)
    import jax

    from vmoe.evaluate.sample import data_of
    from vmoe.factory import load
    from vmoe.studies.attack.images import check_attack, needs_one_device

    devices = args.devices
    if needs_one_device(args.method) and not (args.mesh or args.fsdp):
        devices = {}
        if (count := jax.local_device_count()) > 1:
            split = "only --gradient-path all without --auxiliary-loss is split"
            print_messages([f"1 of {count} devices is used: {split}"])
    configs = [AttackConfig(epsilon, **vars(args.method)) for epsilon in args.epsilon]
    models = [args.load(**devices)]
    if args.compare:
        models.append(load(args.compare, use_ema=args.use_ema, **devices))
    for loaded in models:
        with naming(loaded.origin.path):
            check_attack(loaded.model, configs[0])
    data = args.data or data_of(models[0])
    rows = [row for loaded in models for row in _rows(args, data, loaded, configs)]
    if args.json:
        print_json(rows)
        return
    print_table(COLUMNS, map(_texts, rows), title=rows[0]["data"])


def _rows(
    args: AttackArgs, data: str, loaded: "Loaded", configs: Sequence[AttackConfig]
) -> list[dict[str, Any]]:
    """One row for each strength."""
    from vmoe.data.pipeline import ORDER, check_labeled
    from vmoe.evaluate.sample import Sample
    from vmoe.studies.attack.images import attack, summary

    sample = Sample(data, loaded, images=args.images, batch_size=args.batch_size)
    check_labeled(sample.source)
    results: list[list[Any]] = [[] for _ in configs]
    labels = []
    what, steps = f"attacking {loaded.origin.path}, images read by", len(configs) * sample.steps
    with (
        sample.start_workers(args.num_workers) as workers,
        progress(f"{what} {workers}", steps) as advance,
    ):
        for batch in sample.batches():
            if not batch.valid.any():
                continue
            labels.append(batch.labels[batch.valid])
            for config, parts in zip(configs, results, strict=True):
                parts.append(attack(loaded.model, *batch[:2], config, valid=batch.valid))
                advance()
    print_messages(sample.messages())
    about = {"model": str(loaded.origin.path), "data": sample.source.name, "order": ORDER}
    return [
        about | {"epsilon": config.epsilon} | summary(parts, np.concatenate(labels))
        for config, parts in zip(configs, results, strict=True)
    ]


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    overlap = ", ".join(f"block {i}: {value:.0%}" for i, value in row["overlap"].items())
    return (
        row["model"],
        f"{row['epsilon']:g}",
        f"{row['accuracy_before']:.1%} ± {100 * row['standard_error_before']:.1f}",
        f"{row['accuracy_after']:.1%} ± {100 * row['standard_error_after']:.1f}",
        f"{row['changed']:.1%}",
        f"{row['loss_after']:.2f}",
        overlap or "-",
    )
