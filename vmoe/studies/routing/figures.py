"""The figures of a trained model's routing on a data set, as PNG files."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vmoe import models
from vmoe.analysis import collect, concatenate, plots
from vmoe.analysis.effects import at_capacities, at_k, can_be_limited, with_random_routers
from vmoe.config import MoEConfig, RoutingOverrides, ViTConfig, replace
from vmoe.costs.flops import flops_to_logits
from vmoe.nn.inputs import has_label
from vmoe.nn.patches import num_tokens
from vmoe.passes import as_on_one_device
from vmoe.studies.routing.measure import MeasuredRouting
from vmoe.workdir.layout import replacing

Draw = Callable[[MeasuredRouting], Figure]

FACTORS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5)
"""Capacity factors of the curves, in addition to a line with all choices dropped."""
SHOWN_FACTORS = (0.5, 0.25, 0.125)
"""Capacity factors at which images are shown."""
PATCHES = 10
"""Patches to show per expert."""
DPI = 100
OF_CLASSES = ("capacity_curves", "experts_by_class", "k_at_inference", "random_routers")
"""Figures that need images of known class."""


def write_plots(
    routing: MeasuredRouting, folder: Path, *, on_plot: Callable[[], None] = lambda: None
) -> list[Path]:
    """Writes the figures that apply to the routers and the images; see ``plots_of``.

    The figures in ``OF_CLASSES`` are left out if no image has a known class.

    Args:
        folder: created if its parent exists; files with the same names are replaced.
        on_plot: called after each figure, even if it is left out.

    Returns:
        the files.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    any_class = bool(has_label(routing.labels).any())
    files = []
    for name, draw in plots_of(routing.loaded.model.config).items():
        if any_class or name not in OF_CLASSES:
            path, figure = folder / f"{name}.png", draw(routing)
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=DPI)
            files.append(path)
        on_plot()
    return files


def plots_of(config: ViTConfig) -> dict[str, Draw]:
    """By name, the functions that draw the figures of a model.

    Soft routers make no choices, so a model that has one has only two figures. Slots,
    priorities and k are changed only if every router has these settings. Without a gate, no patch
    has a larger gate than another, and no router can be made random.
    """
    routers = [moe.router for moe in config.moe_blocks.values()]
    figures: dict[str, Draw] = {}
    if config.learned:
        figures |= {
            "top_patches": lambda routing: plots.top_patches(
                {i: best.first(PATCHES) for i, best in routing.top_patches.items()}
            ),
            "random_routers": _random_routers,
        }
    if all(router.logits_per != "slot" for router in routers):
        figures |= {
            "experts_by_class": lambda routing: plots.experts_by_class(
                routing.blocks, routing.loaded.class_names
            ),
            "experts_of_patches": _experts_of_patches,
            "weight_histograms": lambda routing: plots.weight_histograms(routing.blocks),
            "kept_patches": _kept_patches,
        }
    if can_be_limited(config):
        figures["capacity_curves"] = _capacity_curves
    if routers and all(router.has("k") for router in routers):
        figures["k_at_inference"] = _k_at_inference
    return figures


def _experts_of_patches(routing: MeasuredRouting) -> Figure:
    """The figure for the images of the first batch."""
    images, model = routing.first(routing.batch_size), routing.loaded.model
    collected = concatenate(collect(model, [as_on_one_device(images, placement=model.placement)]))
    return plots.experts_of_patches(images, collected, patch_size=model.config.patch_size)


def _kept_patches(routing: MeasuredRouting) -> Figure:
    """The figure for the first sparse block and the images of the first batch."""
    images = routing.first(routing.batch_size)
    model, config = routing.loaded.model, routing.loaded.model.config
    block, moe = next(iter(config.moe_blocks.items()))
    by_gate = moe.router.has("priority")
    columns = _slots(routing.loaded.counted_config, SHOWN_FACTORS)
    limits = RoutingOverrides(capacity=max(columns), priority="largest_gate" if by_gate else None)
    changed = models.with_params(
        limits.apply(config), models.params_of(model), placement=model.placement
    )
    at_most = concatenate(collect(changed, [as_on_one_device(images, placement=model.placement)]))
    collected, widest = {}, at_most.blocks[block]
    for slots, factor in columns.items():
        # The gates and queues of the first sparse block do not depend on the number of slots.
        positions = np.where(widest.positions < slots, widest.positions, -1)
        title = f"capacity factor {factor:.3g}\n{slots} slots" + ", largest gate" * by_gate
        collected[title] = at_most._replace(blocks={block: widest._replace(positions=positions)})
    return plots.kept_patches(images, collected, block=block, patch_size=config.patch_size)


def _slots(config: ViTConfig, factors: Sequence[float]) -> dict[int, float]:
    """Numbers of slots in the first sparse block's full groups, and their capacity factors."""
    moe = next(iter(config.moe_blocks.values()))
    s, even = _group(config, moe), _even(config, moe)
    every = [min(s, max(1, round(factor * even))) for factor in factors]
    return {slots: slots / even for slots in every}


def _group(config: ViTConfig, moe: MoEConfig) -> int:
    """The tokens of a full group."""
    return moe.router.images_per_group * num_tokens(config)


def _even(config: ViTConfig, moe: MoEConfig) -> float:
    """The slots of an expert at capacity factor 1, in full groups."""
    return _group(config, moe) * moe.router.k / moe.num_experts


def _capacity_curves(routing: MeasuredRouting) -> Figure:
    model, config = routing.loaded.model, routing.loaded.counted_config
    slots = list(_slots(config, FACTORS))
    logits = at_capacities(model, routing.batches(), [0, *slots])

    def flops(number: int) -> float:
        return flops_to_logits(
            config.with_layers(
                lambda moe: replace(moe, router=moe.router.with_slots(capacity=number))
            )
        )

    even = {_even(config, moe) for moe in config.moe_blocks.values()}
    return plots.capacity_curves(
        logits,
        routing.labels,
        {number: flops(number) for number in slots},
        even=even.pop() if len(even) == 1 else None,
    )


def _k_at_inference(routing: MeasuredRouting) -> Figure:
    """The figure for the model's own k and k = 1, 2, 4, ... up to the fewest experts of a block."""
    config = routing.loaded.counted_config
    layers = config.moe_blocks.values()
    at_most = min(moe.num_experts for moe in layers)
    own = {moe.router.k for moe in layers}
    powers = {1 << i for i in range(at_most.bit_length())}
    ks = sorted(k for k in powers | own if k <= at_most)
    logits = at_k(routing.loaded.model, routing.batches(), ks)
    slots = {}
    for k in ks:
        changed = RoutingOverrides(k=k).apply(config).moe_blocks.values()
        slots[k] = [moe.slots(_group(config, moe)) for moe in changed]
    return plots.k_at_inference(
        logits, routing.labels, own=own.pop() if len(own) == 1 else None, slots=slots
    )


def _random_routers(routing: MeasuredRouting) -> Figure:
    logits = with_random_routers(routing.loaded.model, routing.batches())
    return plots.random_routers(logits, routing.predictions, routing.labels)
