"""``vmoe upcycle``."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from vmoe.cli.arguments import parse


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
    noise_std: float = 0.0
    """Standard deviation of the noise added to the kernels of the experts, relative to the standard
    deviation of the kernel."""
    seed: int = 0
    """Seed of the routers and the noise."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""


def run(argv: Sequence[str]) -> None:
    """Reads a dense model, and writes a sparse one."""
    args = parse(UpcycleArgs, "upcycle", argv)
    from vmoe.checkpoints import read, write
    from vmoe.surgery.upcycle import logit_changes, upcycle_params, upcycled_layer

    stored = read(args.source, use_ema=args.use_ema)
    router: dict[str, Any] = {"k": args.k, "normalize_weights": args.normalize_weights}
    if args.capacity_factor is not None:
        router["capacity_factor"] = args.capacity_factor
    moe = upcycled_layer(stored.config, num_experts=args.num_experts, router=router)
    numbers = re.fullmatch(r"[0-9]+(,[0-9]+)*", args.blocks)
    blocks = [int(i) for i in args.blocks.split(",")] if numbers else args.blocks
    config, params = upcycle_params(
        stored.config,
        stored.params,
        blocks=blocks,
        moe=moe,
        noise_std=args.noise_std,
        seed=args.seed,
    )
    sparse = stored._replace(config=config, params=params)
    written = write(sparse, args.destination, format="vmoe")
    print(f"{written}: {args.num_experts} experts in blocks {config.sparse_blocks}")
    changes = logit_changes(stored.config, moe, noise_std=args.noise_std)
    if changes:
        print(f"its logits differ from those of {args.source}: {'; '.join(changes)}")
    else:
        print(f"its logits are those of {args.source}, up to rounding")
