"""A model on one page: its shape, its parts, what it costs."""

import collections
import io
import math

from flax import nnx
from rich.console import Console
from rich.table import Table

from vmoe import models
from vmoe.config import ViTConfig
from vmoe.costs.flops import cost, flops_to_logits
from vmoe.nn.parts import NORMS, PARTS, part_of
from vmoe.nn.vit import num_tokens
from vmoe.routing import slots_and_factor


def summarize(config: ViTConfig, *, title: str = "model") -> str:
    """The page as text: parameters by part, active parameters, FLOPs, slots per expert."""
    found = cost(config)
    table = Table("part", "parameters", "share", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, size in parameters_by_part(config).items():
        table.add_row(part, f"{size:,}", f"{size / found.parameters:.1%}")
    table.add_section()
    table.add_row("all", f"{found.parameters:,}", "")
    active = found.active_parameters
    table.add_row("active per token", f"{active:,.0f}", f"{active / found.parameters:.1%}")
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    lines = [
        f"{config.depth} blocks, width {config.width}, {config.num_heads} heads, MLP {config.mlp_dim}, "
        f"patches of {config.patch_size} px: {found.tokens_per_image} tokens at {config.image_size} px",
        f"{found.flops_per_image / 1e9:.4g} GFLOPs per image "
        "(forward, matrix products; a multiply-add is 2), "
        f"{flops_to_logits(config) / 1e9:.4g} of what reaches the logits",
        *_sparse_lines(config),
    ]
    return console.file.getvalue().rstrip() + "\n" + "\n".join(lines)


def parameters_by_part(config: ViTConfig) -> dict[str, int]:
    """How many parameters each part has, over all blocks."""
    sizes: dict[str, int] = collections.Counter()
    for path, leaf in nnx.to_flat_state(nnx.state(models.build_abstract(config), nnx.Param)):
        sizes[part_of(path)] += math.prod(leaf.shape)
    return {part: sizes[part] for part in (*PARTS.values(), NORMS) if part in sizes}


def _sparse_lines(config: ViTConfig) -> list[str]:
    lines = []
    for block in config.sparse_blocks:
        moe = config.moe_of(block)
        s = moe.images_per_group * num_tokens(config)
        slots, factor = slots_and_factor(moe, s)
        room = (
            "no capacity"
            if moe.dropless
            else f"{slots} slots each for the {s} tokens of {moe.images_per_group} images "
            f"(a capacity factor of {factor:.3g})"
        )
        lines.append(f"block {block}: {moe.num_experts} experts, {moe.router.kind}, {room}")
    return lines or ["no sparse block"]
