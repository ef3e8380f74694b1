"""``vmoe upcycle``."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import tyro

from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_messages

if TYPE_CHECKING:
    import numpy as np

    from vmoe.checkpoints import StoredModel


@dataclasses.dataclass(frozen=True)
class UpcycleArgs:
    """Make a dense model sparse: its MLPs become experts (arXiv 2212.05055).

    Example: `vmoe upcycle vit_fashion_mnist upcycled --num-experts 8`
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Trained dense model, as for `vmoe evaluate --checkpoint`."""
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DESTINATION")]
    """New folder, or hf://OWNER/NAME; `vmoe train --init` can start from it."""
    blocks: str = "every2"
    """Blocks that get experts: every2 (1, 3, 5, ...), lastN (the last N of every2), or numbers
    counted from 0, such as 5,7."""
    num_experts: int = 8
    """Number of experts in each of these blocks."""
    k: int = 2
    """Experts per token."""
    normalize_weights: bool = True
    """Divide a token's combine weights by their sum, which keeps the dense model's logits."""
    capacity_factor: float | None = None
    """Capacity factor: an expert has k * capacity_factor / num_experts slots per token of a group.
    If None, the layers are dropless."""
    start: Literal["copies", "noise", "drop", "split", "clusters", "low_rank"] = "copies"
    """What the experts and the router start from. copies: each expert is a copy of the MLP; noise:
    with noise on its kernels; drop: with some hidden units re-initialized (Drop-Upcycling,
    arXiv 2502.19261); split: each expert has a part of the MLP's hidden units (MoEfication, arXiv
    2110.01786); clusters: copies, and the router starts at clusters of tokens (arXiv 2604.13508);
    low_rank: the MLP stays as a shared expert, beside small experts (arXiv 2312.02923)."""
    noise_std: float | None = None
    """For noise: standard deviation of the noise, relative to the kernel's; 0.1 if None."""
    drop_ratio: float | None = None
    """For drop: share of the hidden units that are re-initialized; 0.5 if None."""
    rank: int | None = None
    """For low_rank: hidden width of the routed experts; 8 if None."""
    data: str = ""
    """For clusters: NAME[:SPLIT] of the images, of any classes. If empty, the data set of the run;
    without a split, the training split."""
    images: int = 256
    """For clusters: number of images, drawn at random, of whose tokens at most 16,384 of a block
    are clustered."""
    seed: int = 0
    """Seed of the routers and of the start."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""

    no_effect: ClassVar[dict[str, str]] = {
        "noise_std": "without start=noise",
        "drop_ratio": "without start=drop",
        "rank": "without start=low_rank",
        "data": "without start=clusters",
        "images": "without start=clusters",
    }


def run(argv: Sequence[str]) -> None:
    """Reads a dense model, and writes a sparse one."""
    args = parse(UpcycleArgs, "upcycle", argv)
    from vmoe.checkpoints import read, write
    from vmoe.surgery.starts import STARTS
    from vmoe.surgery.upcycle import logit_changes, upcycle_params, upcycled_layer

    kind = STARTS[args.start]
    settings = {field.name: getattr(args, field.name) for field in dataclasses.fields(kind)}
    start = kind(**{name: value for name, value in settings.items() if value is not None})
    stored = read(args.source, use_ema=args.use_ema)
    router: dict[str, Any] = {"k": args.k, "normalize_weights": args.normalize_weights}
    if args.capacity_factor is not None:
        router["capacity_factor"] = args.capacity_factor
    moe = upcycled_layer(stored.config, start, num_experts=args.num_experts, router=router)
    numbers = re.fullmatch(r"[0-9]+(,[0-9]+)*", args.blocks)
    blocks = [int(i) for i in args.blocks.split(",")] if numbers else args.blocks
    config, params = upcycle_params(
        stored.config,
        stored.params,
        blocks=blocks,
        moe=moe,
        start=start,
        tokens=_tokens(args, stored, blocks) if start.reads_tokens else None,
        seed=args.seed,
    )
    sparse = stored._replace(config=config, params=params)
    written = write(sparse, args.destination, format="vmoe")
    print(f"{written}: {args.num_experts} experts in blocks {config.sparse_blocks}")
    changes = logit_changes(stored.config, moe, start)
    if changes:
        print(f"its logits differ from those of {args.source}: {'; '.join(changes)}")
    else:
        print(f"its logits are those of {args.source}, up to rounding")


def _tokens(
    args: UpcycleArgs, stored: "StoredModel", blocks: str | list[int]
) -> "dict[int, np.ndarray]":
    """The inputs of the MLPs of the blocks, for a sample of data of any classes."""
    from vmoe.data.reading import Reading
    from vmoe.data.sources import sample, skipped_messages
    from vmoe.data.unreadable import Unreadable
    from vmoe.evaluate.sample import open_any_classes
    from vmoe.fields import at_least
    from vmoe.passes import inputs
    from vmoe.surgery.upcycle import mlp_inputs

    at_least(1).check(images=args.images)
    source, replace = open_any_classes(args.data, stored, split="train")
    source, left_out = sample(source, args.images), Unreadable("left out")
    reading = Reading(min(64, args.images), on_unreadable=left_out.add if replace else None)
    model = stored.model()
    batches = inputs(model, source, stored.preprocessing, reading, any_classes=True)
    found = mlp_inputs(model, batches, blocks, seed=args.seed)
    print_messages([*skipped_messages([source]), *left_out.news()])
    return found
