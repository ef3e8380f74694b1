"""``vmoe probe``."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from vmoe.cli.arguments import parse
from vmoe.cli.evaluate import named
from vmoe.cli.model import DeviceArgs, ModelArgs
from vmoe.cli.printing import print_json, print_messages, print_table
from vmoe.config import FewShotConfig
from vmoe.config.data import CHECKS
from vmoe.fields import at_least
from vmoe.host.progress import progress

if TYPE_CHECKING:
    from vmoe.evaluate.fewshot import FewShotResult
    from vmoe.factory import Loaded

PREPARED = {
    "model": "images were prepared as for the model (--preprocessing paper for the paper's resize "
    "and crop)",
    "paper": "images were resized to 256/224 of the model's size and cropped, as in the paper "
    "(--preprocessing model to prepare them as for the model)",
}
L2_CHOSEN = {
    "test": "each L2 was chosen on the test images, as in the paper, so that accuracies are "
    "optimistic; --choose-l2 train avoids this",
    "train": "each L2 was chosen on training images that are not used as shots",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProbeArgs(DeviceArgs, ModelArgs):
    """Evaluate the features of a trained model by linear probes on a few images of each class.

    Example: `vmoe probe --checkpoint vmoe_fashion_mnist --data digits`
    """

    data: tuple[str, ...] = ()
    """Data sets, each NAME or NAME:TRAIN,TEST. If empty, the data set of the run."""
    shots: tuple[int, ...] = FewShotConfig.shots
    """Numbers of training images per class; each is a probe."""
    seed: int = 0
    """Seed of the choice of the training images."""
    choose_l2: Literal["test", "train"] = "test"
    """Images on which the L2 penalty of a probe is chosen. test: the test images, as in the paper,
    which gives optimistic accuracies; train: other training images."""
    preprocessing: Literal["model", "paper"] | None = None
    """How the images are prepared. model: as for the model; paper: resized to 256/224 of its size
    and cropped, as in the paper. If None, paper for published V-MoE weights and their copies, model
    for all others."""
    batch_size: int = 256
    """Images per batch and device; only images of one batch on one device can compete for slots."""
    json: bool = False
    """Print one JSON object and nothing else."""


def run(argv: Sequence[str]) -> None:
    """Fits linear probes, and prints their accuracies."""
    args = parse(ProbeArgs, "probe", argv)
    from vmoe.data.pipeline import start_workers
    from vmoe.data.reading import Reading
    from vmoe.data.sources import skipped_messages
    from vmoe.data.unreadable import Unreadable
    from vmoe.evaluate.fewshot import fewshot, open_fewshot

    at_least(1).check(batch_size=args.batch_size)
    loaded = args.load(**args.devices)
    config = _config(args, loaded)
    checks = loaded.train_config.data.checks if loaded.train_config else CHECKS
    data = open_fewshot(config, checks)
    left_out = Unreadable("left out")
    sources = [source for each in data for source in each.sources]
    steps = len(data) * len(config.shots) + sum(-(-len(x) // config.batch_size) for x in sources)
    most, how = max(sources, key=len), config.prepare(loaded.preprocessing)
    with (
        start_workers(args.num_workers, most, config.batch_size, how) as workers,
        progress(f"few-shot probes, images read by {workers}", steps) as advance,
    ):
        result = fewshot(
            loaded.model,
            data,
            config,
            loaded.preprocessing,
            Reading(
                workers=workers,
                on_batch=advance,
                on_unreadable=left_out.add if checks.on_error == "replace" else None,
            ),
        )
    of_data = [message for each in data for message in each.messages]
    print_messages([*skipped_messages(sources), *of_data, *left_out.news()])
    if args.json:
        print_json(
            {
                "step": loaded.step,
                "weights": loaded.origin.weights,
                "shots": result.shots,
                "accuracy": result.accuracy,
                "mean": result.mean,
                "l2": result.l2,
                "l2_chosen_on": config.choose_l2,
                "preprocessing": config.preprocessing,
                "seed": config.seed,
            }
        )
        return
    title = f"{named(loaded)}, few-shot accuracy"
    columns = ("", *(f"{n} shot{'s' * (n > 1)}" for n in result.shots))
    print_table(columns, _rows(result), title=title)
    print(PREPARED[config.preprocessing])
    print(L2_CHOSEN[config.choose_l2])


def _config(args: ProbeArgs, loaded: "Loaded") -> FewShotConfig:
    from vmoe.evaluate.sample import data_of

    # Weights of the paper's authors do not say how images were prepared.
    theirs = (loaded.origin.copied_from or loaded.origin.format) in ("published", "npz")
    return FewShotConfig(
        data=args.data or (data_of(loaded),),
        shots=args.shots,
        seed=args.seed,
        choose_l2=args.choose_l2,
        preprocessing=args.preprocessing or ("paper" if theirs else "model"),
        batch_size=args.batch_size * loaded.model.placement.devices,
    )


def _rows(result: "FewShotResult") -> Iterator[tuple[str, ...]]:
    """For each data set, their mean, and the chosen L2."""
    mean = [("mean", result.mean)] if len(result.accuracy) > 1 else []
    for name, row in [*result.accuracy.items(), *mean]:
        yield name, *(f"{accuracy:.2%}" for accuracy in row)
    yield "L2", *(f"{l2:.4g}" for l2 in result.l2)
