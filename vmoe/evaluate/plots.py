"""The figures of a trained model's routing on a data set, as PNG files."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int

from vmoe import models
from vmoe.analysis import BlockStatistics, collect, concatenate
from vmoe.analysis.collect import without_padding
from vmoe.analysis.effects import at_capacities, at_k, can_be_limited, with_random_routers
from vmoe.analysis.patches import Favourites, favourites
from vmoe.config import MoEConfig, RoutingOverrides, Soft, TokenChoice, ViTConfig, replace
from vmoe.costs.flops import flops_to_logits
from vmoe.evaluate.routing import Batches
from vmoe.factory import Loaded
from vmoe.nn.inputs import has_label
from vmoe.nn.patches import num_tokens
from vmoe.routing import slots_and_factor
from vmoe.workdir.layout import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Loaded, Batches, Mapping[int, BlockStatistics]], "Figure"]

FACTORS = (0.125, 0.25, 0.375, 0.5, 0.75, 1.0, 1.5)
"""Capacity factors of the curves; beside them every choice is dropped."""
SHOWN_FACTORS = (0.5, 0.25, 0.125)
"""Those at which images are shown."""
DPI = 100
OF_CLASSES = ("capacity_curves", "experts_by_class", "k_at_inference", "random_routers")
"""Figures of images whose classes are known."""


def write_plots(
    loaded: Loaded,
    batches: Batches,
    blocks: Mapping[int, BlockStatistics],
    folder: Path,
    *,
    on_plot: Callable[[], None] = lambda: None,
) -> list[Path]:
    """Writes each figure that has a meaning for the routers and the images; see ``plots_of``.

    Those of ``OF_CLASSES`` are left out if no image has a known class.

    Args:
        batches: gives the batches of the data; called by most figures.
        blocks: the statistics of these data by sparse block.
        folder: made if its parent exists; files of the same names are replaced.
        on_plot: called after each figure, also if it is left out.

    Returns:
        the files.

    Raises:
        OSError: the folder or a file cannot be written.
    """
    folder.mkdir(exist_ok=True)
    any_class = bool(has_label(labels_of(blocks)).any())
    files = []
    for name, draw in plots_of(loaded.model.config).items():
        if any_class or name not in OF_CLASSES:
            files.append(write_figure(draw(loaded, batches, blocks), folder / f"{name}.png"))
        on_plot()
    return files


def plots_of(config: ViTConfig) -> "dict[str, Draw]":
    """By name, the functions that draw the figures of such a model.

    Soft routers make no choices, so a model that has one has only two figures. Slots, priorities
    and k are changed only if every router is token_choice.
    """
    routers = [moe.router for moe in config.moe_blocks.values()]
    plots: dict[str, Draw] = {
        "favourite_patches": _favourite_patches,
        "random_routers": _random_routers,
    }
    if not any(isinstance(router, Soft) for router in routers):
        plots |= {
            "experts_by_class": _experts_by_class,
            "experts_of_patches": _experts_of_patches,
            "weight_histograms": _weight_histograms,
            "kept_patches": _kept_patches,
        }
    if can_be_limited(config):
        plots |= {"capacity_curves": _capacity_curves, "k_at_inference": _k_at_inference}
    return plots


def write_figure(figure: "Figure", path: Path, *, dpi: int = DPI) -> Path:
    """Writes a picture; see ``replacing``.

    Raises:
        OSError: the file cannot be written.
        ValueError: its suffix is of no format that can be drawn.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=dpi)
    return path


def _experts_by_class(
    loaded: Loaded, batches: Batches, blocks: Mapping[int, BlockStatistics]
) -> "Figure":
    from vmoe.analysis.plots import experts_by_class

    return experts_by_class(blocks, loaded.class_names)


def _experts_of_patches(
    loaded: Loaded, batches: Batches, blocks: Mapping[int, BlockStatistics]
) -> "Figure":
    """Of the images of the first batch."""
    from vmoe.analysis.plots import experts_of_patches

    batch = next(batches())
    collected = concatenate(collect(loaded.model, [batch]))
    patch_size = loaded.model.config.patch_size
    return experts_of_patches(without_padding(batch), collected, patch_size=patch_size)


def _weight_histograms(
    loaded: Loaded, batches: Batches, blocks: Mapping[int, BlockStatistics]
) -> "Figure":
    from vmoe.analysis.plots import weight_histograms

    return weight_histograms(blocks)


def _favourite_patches(
    loaded: Loaded, batches: Batches, blocks: Mapping[int, BlockStatistics]
) -> "Figure":
    from vmoe.analysis.plots import favourite_patches

    return favourite_patches(favourites_of(loaded, batches))


def favourites_of(loaded: Loaded, batches: Batches, *, top: int = 10) -> dict[int, Favourites]:
    """See ``vmoe.analysis.patches.favourites``; every image is read once."""
    shown, collected = itertools.tee(batches())  # advance together, so one batch is held
    parts = collect(loaded.model, collected)
    return favourites(shown, parts, loaded.model.config.patch_size, top=top)


def _kept_patches(
    loaded: Loaded, batches: Batches, blocks: Mapping[int, BlockStatistics]
) -> "Figure":
    """In the first sparse block, for the images of the first batch."""
    from vmoe.analysis.plots import kept_patches

    batch = next(batches())
    model, config = loaded.model, loaded.model.config
    block, moe = next(iter(config.moe_blocks.items()))
    by_gate = isinstance(moe.router, TokenChoice)
    columns = _slots(config, SHOWN_FACTORS)
    limits = RoutingOverrides(capacity=max(columns), priority="largest_gate" if by_gate else None)
    changed = models.with_params(
        limits.apply(config), models.params_of(model), placement=model.placement
    )
    routing = concatenate(collect(changed, [batch]))
    collected, widest = {}, routing.blocks[block]
    for slots, factor in columns.items():
        # The gates and queues of the first sparse block do not depend on the number of slots.
        positions = np.where(widest.positions < slots, widest.positions, -1)
        title = f"capacity factor {factor:.3g}\n{slots} slots" + ", largest gate" * by_gate
        collected[title] = routing._replace(blocks={block: widest._replace(positions=positions)})
    images = without_padding(batch)
    return kept_patches(images, collected, block=block, patch_size=config.patch_size)


def _slots(config: ViTConfig, factors: Sequence[float]) -> dict[int, float]:
    """Numbers of slots in the first sparse block's full groups, and their capacity factors."""
    moe = next(iter(config.moe_blocks.values()))
    s, even = _group(config, moe), _even(config, moe)
    every = [min(s, max(1, round(factor * even))) for factor in factors]
    return {slots: slots / even for slots in every}


def _group(config: ViTConfig, moe: MoEConfig) -> int:
    """The tokens of a full group."""
    return moe.images_per_group * num_tokens(config)


def _even(config: ViTConfig, moe: MoEConfig) -> float:
    """The slots of an expert at capacity factor 1, in full groups."""
    return _group(config, moe) * moe.router.experts_per_token / moe.num_experts


def _capacity_curves(
    loaded: Loaded, batches: Batches, blocks: Mapping[int, BlockStatistics]
) -> "Figure":
    from vmoe.analysis.plots import capacity_curves

    model, config = loaded.model, loaded.model.config
    slots = list(_slots(config, FACTORS))
    logits = at_capacities(model, batches(), [0, *slots])
    flops = {number: flops_to_logits(_with_slots(config, number)) for number in slots}
    even = {_even(config, moe) for moe in config.moe_blocks.values()}
    own = even.pop() if len(even) == 1 else None
    return capacity_curves(logits, labels_of(blocks), flops, even=own)


def labels_of(blocks: Mapping[int, BlockStatistics]) -> Int[np.ndarray, "b l"]:
    return next(iter(blocks.values())).labels


def _with_slots(config: ViTConfig, slots: int) -> ViTConfig:
    return config.with_layers(lambda moe: replace(moe, capacity=slots, dropless=False))


def _k_at_inference(
    loaded: Loaded, batches: Batches, blocks: Mapping[int, BlockStatistics]
) -> "Figure":
    """For k = 1, 2, 4 and so on, and the model's own, up to the number of experts of each block."""
    from vmoe.analysis.plots import k_at_inference

    config = loaded.model.config
    layers = config.moe_blocks.values()
    at_most = min(moe.num_experts for moe in layers)
    own = {moe.router.experts_per_token for moe in layers}
    powers = {1 << i for i in range(at_most.bit_length())}
    ks = sorted(k for k in powers | own if k <= at_most)
    logits = at_k(loaded.model, batches(), ks)
    slots = {}
    for k in ks:
        changed = RoutingOverrides(k=k).apply(config).moe_blocks.values()
        slots[k] = [slots_and_factor(moe, _group(config, moe))[0] for moe in changed]
    return k_at_inference(
        logits, labels_of(blocks), own=own.pop() if len(own) == 1 else None, slots=slots
    )


def _random_routers(
    loaded: Loaded, batches: Batches, blocks: Mapping[int, BlockStatistics]
) -> "Figure":
    from vmoe.analysis.plots import random_routers

    own = concatenate(collect(loaded.model, batches()))
    logits = with_random_routers(loaded.model, batches())
    return random_routers(logits, own.logits, own.labels)
