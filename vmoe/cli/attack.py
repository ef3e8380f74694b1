"""``vmoe attack``."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import tyro

from vmoe.cli import mates
from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_json, print_messages, print_table, progress
from vmoe.config import RoutingOverrides
from vmoe.config.attack import AttackConfig, AttackMethod, MatesConfig
from vmoe.errors import naming

if TYPE_CHECKING:
    from vmoe.factory import Loaded


@dataclasses.dataclass(frozen=True)
class AttackArgs:
    """Measure how robust predictions and routing are to adversarial changes of images.

    Either of the attacked image, or of the other images in its group."""

    checkpoint: Path
    """Trained model, as for `vmoe evaluate --checkpoint`."""
    target: Literal["images", "mates"] = "images"
    """images: change the attacked image. mates: leave it as it is, and choose and change the other
    images of its group, which take its slots."""
    beside: Path | None = None
    """Another model to attack in the same way, such as a dense one."""
    data: str = ""
    """NAME[:SPLIT]; the data set of the run if empty, its test split if no split is named."""
    images: int = 512
    """Number of images, a random sample of the split; at most all of them."""
    batch_size: int = 64
    """Images per batch."""
    epsilon: tuple[float, ...] = ()
    """Bounds on the change of a pixel (L-infinity), in units of 1/255 of its range; one attack for
    each. If not given, 1, 2, 4 and 8; for mates, which need not look natural, 64."""
    method: Annotated[AttackMethod, tyro.conf.arg(name="")] = AttackMethod()
    mates: MatesConfig = MatesConfig()
    routing: RoutingOverrides = RoutingOverrides()
    """Routing settings of --checkpoint; the model of --beside keeps its own."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""
    json: bool = False
    """Print one JSON object and nothing else."""

    no_effect: ClassVar[dict[str, str]] = {
        "mates": "without target=mates",
        "beside": "with target=mates",
        "method.auxiliary_loss": "with target=mates",
        "method.path": "with target=mates",
    }

    def configs(self, *otherwise: float) -> list[AttackConfig]:
        """The attack at each epsilon that is given, or else at these."""
        return [AttackConfig(e, **vars(self.method)) for e in self.epsilon or otherwise]


def run(argv: Sequence[str]) -> None:
    """Attacks one or two trained models, and prints what is left of their accuracy."""
    args = parse(AttackArgs, "attack", argv)
    if args.target == "mates":
        mates.run(args)
        return
    from vmoe.evaluate.attack import check_attack
    from vmoe.evaluate.sample import data_of
    from vmoe.factory import load

    configs = args.configs(1.0, 2.0, 4.0, 8.0)
    models = [load(args.checkpoint, routing=args.routing, use_ema=args.use_ema)]
    if args.beside:
        models.append(load(args.beside, use_ema=args.use_ema))
    for loaded in models:
        with naming(loaded.origin.path):
            check_attack(loaded.model, configs[0])
    data = args.data or data_of(models[0])
    rows = [row for loaded in models for row in _attacked(args, data, loaded, configs)]
    if args.json:
        print_json(rows)
        return
    print_table(COLUMNS, map(_texts, rows), title=rows[0]["data"])


COLUMNS = ("model", "epsilon / 255", "accuracy before", "after", "changed", "loss after", "overlap")


def _attacked(
    args: AttackArgs, data: str, loaded: "Loaded", configs: Sequence[AttackConfig]
) -> list[dict[str, Any]]:
    """One row for each strength."""
    from vmoe.data.pipeline import ORDER, check_labelled
    from vmoe.evaluate.attack import attack
    from vmoe.evaluate.sample import Sample

    sample = Sample(data, loaded, images=args.images, batch_size=args.batch_size)
    check_labelled(sample.source)
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
    return [
        {
            "model": str(loaded.origin.path),
            "data": sample.source.name,
            "order": ORDER,
            "epsilon": config.epsilon,
            **_measures(parts, np.concatenate(labels)),
        }
        for config, parts in zip(configs, results, strict=True)
    ]


def _measures(parts: list[Any], labels: np.ndarray) -> dict[str, Any]:
    """Means over the images that have a label."""
    from vmoe.nn.inputs import has_label, is_label

    known = has_label(labels)

    def joined(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return np.concatenate(list(arrays))[known]

    before = joined(part.predictions_before for part in parts)
    after = joined(part.predictions_after for part in parts)
    return {
        "images": len(before),
        "unlabelled": len(known) - len(before),
        "accuracy_before": float(is_label(before, labels[known]).mean()),
        "accuracy_after": float(is_label(after, labels[known]).mean()),
        "changed": float((before != after).mean()),
        "loss_after": float(joined(part.losses_after for part in parts).mean()),
        "overlap": {
            str(i): float(joined(part.overlap[i] for part in parts).mean())
            for i in parts[0].overlap
        },
    }


def _texts(row: dict[str, Any]) -> tuple[str, ...]:
    overlap = ", ".join(f"block {i}: {value:.0%}" for i, value in row["overlap"].items())
    return (
        row["model"],
        f"{row['epsilon']:g}",
        f"{row['accuracy_before']:.1%}",
        f"{row['accuracy_after']:.1%}",
        f"{row['changed']:.1%}",
        f"{row['loss_after']:.2f}",
        overlap or "-",
    )
