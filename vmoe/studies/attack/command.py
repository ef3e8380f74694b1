"""``vmoe attack``."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_json, print_messages, print_table, progress
from vmoe.config import RoutingOverrides
from vmoe.errors import UsageError, naming
from vmoe.studies.attack.config import AttackConfig, AttackMethod, MatesConfig

if TYPE_CHECKING:
    from vmoe.factory import Loaded

IMAGES = ("model", "epsilon / 255", "accuracy before", "after", "changed", "loss after", "overlap")
MATES = ("routing", "mates", "accuracy", "changed", "loss", "dropped")
"""The columns of the tables of the two targets; after ± is the standard error over the images."""


@dataclasses.dataclass(frozen=True)
class AttackArgs:
    """Measure how robust predictions and routing are to adversarial changes of images.

    The changes are to the attacked image, or with `--target mates` to other images of its group.

    Example: `vmoe attack --checkpoint vmoe_fashion_mnist --data fashion_mnist_sample`
    """

    checkpoint: Path
    """Trained model, as for `vmoe evaluate --checkpoint`."""
    target: Literal["images", "mates"] = "images"
    """images: change the attacked image. mates: keep it, and choose and change the other images of
    its group, which compete with it for slots."""
    compare: Path | None = None
    """Another model to attack in the same way, such as a dense one."""
    data: str = ""
    """NAME[:SPLIT]; the data set of the run if empty, its test split if no split is named."""
    images: int = 512
    """Number of images, a random sample of the split; at most all of them."""
    batch_size: int = 64
    """Images per batch."""
    epsilon: tuple[float, ...] = ()
    """Bounds on the change of a pixel (L-infinity), in units of 1/255 of its range; one attack for
    each. Default: 1 2 4 8; with --target mates: 64, since mates need not look natural."""
    method: Annotated[AttackMethod, tyro.conf.arg(name="")] = AttackMethod()
    mates: MatesConfig = MatesConfig()
    """For --target mates: the attacked images, the groups drawn for each, and the routing settings
    to try."""
    routing: RoutingOverrides = RoutingOverrides()
    """Routing settings of --checkpoint; the model of --compare keeps its own."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    json: bool = False
    """Print one JSON object and nothing else."""

    no_effect: ClassVar[dict[str, str]] = {
        "mates": "without target=mates",
        "compare": "with target=mates",
        "method.auxiliary_loss": "with target=mates",
        "method.gradient_path": "with target=mates",
        "method.project": "with target=mates",  # which always projects
    }

    def configs(self, *otherwise: float) -> list[AttackConfig]:
        """The attack at each given epsilon, or at these if none is given."""
        return [AttackConfig(e, **vars(self.method)) for e in self.epsilon or otherwise]


def run(argv: Sequence[str]) -> None:
    """Attacks trained models, and prints their accuracy before and after."""
    args = parse(AttackArgs, "attack", argv)
    (_attack_images if args.target == "images" else _attack_mates)(args)


def _attack_images(args: AttackArgs) -> None:
    from vmoe.evaluate.sample import data_of
    from vmoe.factory import load
    from vmoe.studies.attack.images import check_attack

    configs = args.configs(1.0, 2.0, 4.0, 8.0)
    models = [load(args.checkpoint, routing=args.routing, use_ema=args.use_ema)]
    if args.compare:
        models.append(load(args.compare, use_ema=args.use_ema))
    for loaded in models:
        with naming(loaded.origin.path):
            check_attack(loaded.model, configs[0])
    data = args.data or data_of(models[0])
    rows = [row for loaded in models for row in _image_rows(args, data, loaded, configs)]
    if args.json:
        print_json(rows)
        return
    print_table(IMAGES, map(_image_texts, rows), title=rows[0]["data"])


def _image_rows(
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
    with progress(f"attacking {loaded.origin.path}", len(configs) * sample.steps) as advance:
        for images, own, valid in sample.batches():
            if not valid.any():
                continue
            labels.append(own[valid])
            for config, parts in zip(configs, results, strict=True):
                parts.append(attack(loaded.model, images[valid], own[valid], config))
                advance()
    print_messages(sample.messages())
    about = {"model": str(loaded.origin.path), "data": sample.source.name, "order": ORDER}
    return [
        about | {"epsilon": config.epsilon} | summary(parts, np.concatenate(labels))
        for config, parts in zip(configs, results, strict=True)
    ]


def _image_texts(row: dict[str, Any]) -> tuple[str, ...]:
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


def _attack_mates(args: AttackArgs) -> None:
    for name in ("capacity", "capacity_factor", "dropless", "priority"):
        if (value := getattr(args.routing, name)) is not None:
            raise UsageError(
                "use --mates.capacity-factor and --mates.priority",
                **{f"routing.{name}": value, "target": "mates"},
            )
    from vmoe.data.pipeline import ORDER, check_labeled
    from vmoe.evaluate.sample import Sample
    from vmoe.factory import load
    from vmoe.nn.inputs import has_label
    from vmoe.studies.attack.mates import (
        attack_mates,
        check_mates,
        group_size,
        num_steps,
        rows,
        settings,
    )

    loaded = load(args.checkpoint, routing=args.routing, use_ema=args.use_ema)
    with naming(loaded.origin.path):
        check_mates(loaded.model)
    changes = args.configs(64.0)
    sample = Sample(args.data, loaded, images=args.images, batch_size=args.batch_size)
    check_labeled(sample.source)
    batches = []
    for images, labels, valid in sample.batches():
        used = valid & has_label(labels)
        batches.append((images[used], labels[used]))
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
    print_table(MATES, _mates_texts(found), title=title)
    print(
        "worst of the draws, per victim: correct in all draws, changed in any draw, largest loss, "
        "largest share dropped; random signs, optimized: changed mates of the first draw"
    )


def _mates_texts(rows: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
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
