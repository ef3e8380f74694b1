"""The measured routing of a model as JSON values, as a table, and as text."""

from collections.abc import Iterator, Mapping
from typing import Any

from vmoe.analysis import BlockStatistics, block_measures
from vmoe.health import about_unprocessed, all_clear
from vmoe.nn.inputs import has_label
from vmoe.studies.routing.measure import MeasuredRouting

COLUMNS = (
    "block",
    "experts",
    "load",
    "dropped",
    "unprocessed",
    "entropy / ln e",
    "class (shuffled)",
    "position (shuffled)",
)


def values(routing: MeasuredRouting) -> dict[str, Any]:
    """All that was measured, as values of JSON."""
    classes = routing.loaded.model.config.num_classes
    return {
        "data": routing.data,
        "step": routing.loaded.step,
        "blocks": {str(i): _measures(block, classes) for i, block in routing.blocks.items()},
        "changed_by_batch": routing.dependence.changed,
        "findings": [finding._asdict() for finding in routing.findings],
    }


def _measures(block: BlockStatistics, classes: int) -> dict[str, Any]:
    information = chance = position = position_chance = None
    if block.choices.any():
        position, position_chance = block.position_information
        if has_label(block.labels).any():
            information, chance = block.class_information(classes)
    return {
        "load": block.load.tolist(),
        "importance": block.importance.tolist(),
        "dropped": block.dropped,
        "unprocessed": block_measures(vars(block))["unprocessed"],
        "kept_share": block.kept_share,
        "kept_by_priority": block.kept_by_priority.tolist(),
        "choices_by_priority": block.choices_by_priority.tolist(),
        "coactivation": block.coactivation.tolist(),
        "gate_entropy_nats": block.gate_entropy,
        "idle": block.idle.tolist(),
        "class_information": information,
        "class_information_chance": chance,
        "position_information": position,
        "position_information_chance": position_chance,
    }


def rows(routing: MeasuredRouting) -> Iterator[tuple[str, ...]]:
    """A row for each sparse block, under ``COLUMNS``."""
    for i, block in routing.blocks.items():
        own = _measures(block, routing.loaded.model.config.num_classes)
        load = block.load
        yield (
            str(i),
            str(len(load)),
            f"{load.min():.1%} to {load.max():.1%}",
            f"{own['dropped']:.1%}",
            f"{own['unprocessed']:.1%}",
            f"{block.relative_entropy:.0%}",
            _with_chance(own, "class"),
            _with_chance(own, "position"),
        )


def _with_chance(measures: Mapping[str, Any], name: str) -> str:
    own, chance = (measures[f"{name}_information{suffix}"] for suffix in ("", "_chance"))
    return "-" if own is None else f"{own:.3f} ({chance:.3f})"


COMPARED = ("block", "corresponding experts (by chance)", "same choices")


def compared_rows(compared: Mapping[int, Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A row for each sparse block of two models, under ``COMPARED``."""
    for i, block in compared.items():
        same = block["same_choices"]
        experts = f"{block['agreement']:.1%} ({block['agreement_by_chance']:.1%})"
        yield str(i), experts, "-" if same is None else f"{same:.1%}"


def remarks(routing: MeasuredRouting) -> Iterator[str]:
    """Notes below the table: its columns, further measures, and findings; one line each."""
    yield (
        "load: smallest and largest load of an expert; unprocessed: tokens without a routed "
        "expert; entropy: mean entropy of the gates, at most ln e; class, position: normalized "
        "mutual information with the expert, and in parentheses the chance baseline (shuffled "
        "classes or positions)"
    )
    for i, block in routing.blocks.items():
        shares = [
            f"{x:.0%} of {kind.replace('_', ' ')}"
            for kind, x in block.kept_share.items()
            if x is not None
        ]
        if block.dropped and shares:
            yield f"block {i}: choices with a slot: {', '.join(shares)}"
        if about := about_unprocessed(routing.loaded.model.config.moe_blocks[i]):
            yield f"block {i}: {'; '.join(about)}"
    changed = routing.dependence.changed
    yield f"predictions that depend on the other images of a batch: {changed:.1%}"
    yield from map(str, routing.findings)
    if not routing.findings:
        yield all_clear(routing.loaded.model.config, routing.blocks, changed)
