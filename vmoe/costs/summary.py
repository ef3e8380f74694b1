"""A one-page summary of a model: parameters by part, active parameters, FLOPs, slots."""

import collections
import io
import math

from rich.console import Console
from rich.table import Table

from vmoe import models
from vmoe.config import MlpExpert, ViTConfig
from vmoe.costs.flops import Cost, cost, flops_to_logits
from vmoe.nn.parts import NORMS, PARTS, STATE, part_of
from vmoe.nn.patches import num_tokens


def summarize(config: ViTConfig, *, title: str = "model") -> str:
    """The summary as text."""
    costs = cost(config)
    text = io.StringIO()
    console = Console(file=text, width=100, force_terminal=False, force_jupyter=False)
    console.print(_parameter_table(config, costs, title))
    lines = [
        f"{config.description}: {costs.tokens_per_image} tokens at {config.image_size} px",
        f"{costs.flops_per_image / 1e9:.4g} GFLOPs per image "
        "(forward, matmuls; a multiply-add is 2); "
        f"the logits need {flops_to_logits(config) / 1e9:.4g} of them",
        *_sparse_lines(config),
    ]
    return text.getvalue().rstrip() + "\n" + "\n".join(lines)


def parameters_by_part(config: ViTConfig) -> dict[str, int]:
    """The number of parameters of each part, summed over all blocks."""
    sizes: dict[str, int] = collections.Counter()
    for path, leaf in models.abstract_params(config).items():
        sizes[part_of(tuple(path.split("/")))] += math.prod(leaf.shape)
    parts = [part for part in (*PARTS.values(), NORMS) if part != STATE]
    return {part: sizes[part] for part in parts if part in sizes}


def _parameter_table(config: ViTConfig, costs: Cost, title: str) -> Table:
    table = Table("part", "parameters", "share", title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for part, size in parameters_by_part(config).items():
        table.add_row(part, f"{size:,}", f"{size / costs.parameters:.1%}")
    table.add_section()
    table.add_row("all", f"{costs.parameters:,}", "")
    active = costs.active_parameters
    table.add_row("active per token", f"{active:,.0f}", f"{active / costs.parameters:.1%}")
    return table


def _sparse_lines(config: ViTConfig) -> list[str]:
    lines = []
    for block, moe in config.moe_blocks.items():
        s = moe.router.images_per_group * num_tokens(config)
        slots = moe.router.slots(s, moe.num_experts)
        capacity = "dropless"
        if not moe.router.dropless:
            factor = slots * moe.num_experts / (s * moe.router.k)
            capacity = (
                f"{slots} slots each for the {s} tokens of {moe.router.images_per_group} images "
                f"(a capacity factor of {factor:.3g})"
            )
        if moe.slots(s) != slots:
            capacity += f", {moe.slots(s)} in evaluation ({moe.rounded_factor(s):.3g})"
        named = ", ".join(expert.kind for expert in moe.experts.members)
        kinds = "" if moe.experts == MlpExpert() else f" ({named})"
        gate = f" with gate {moe.gate.kind}" if moe.gate else ""
        lines.append(
            f"block {block}: {moe.num_experts} experts{kinds}{moe.shared_phrase}, "
            f"{moe.router.kind}{gate}, {capacity}"
        )
    return lines or ["no sparse block"]
