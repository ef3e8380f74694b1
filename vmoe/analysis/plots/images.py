"""Figures of images: the expert of each patch, the kept patches, the top patches of experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from vmoe.analysis.collect import Collected
from vmoe.analysis.colors import expert_colors, text_color
from vmoe.analysis.patches import TopPatches, on_grid
from vmoe.analysis.plots.style import NORMAL, SMALL, early_to_late, label_experts, panels
from vmoe.errors import UsageError, require

GRAY = 0.5
"""Visible next to black and white patches."""
LEFT = 0.2
"""Contrast of a dropped patch around gray, as a fraction of its original contrast."""
TINT = 0.7
"""Opacity of an expert's color over the image in gray."""
PANEL, LEGIBLE = 1.5, 0.17
"""The sides in inches of an image, and of a patch at least if a number of two digits is on it."""


def experts_of_patches(
    images: Float[np.ndarray, "b h w 3"],
    collected: Collected,
    *,
    patch_size: int,
    blocks: Sequence[int] | None = None,
    show: int = 6,
) -> Figure:
    """Images whose patches have the color and the number of their expert, block by block.

    A patch with several experts shows the one with the largest combine weight; a patch that no
    routed expert processed stays gray. The class token and registers are left out.

    Args:
        images: the collected images, in [-1, 1].
        blocks: the blocks to show; if None, at most six from early to late.
        show: number of images to show, spread over all.
    """
    columns = early_to_late(collected.blocks, blocks, 6)
    experts = {i: _strongest(i, collected, images, patch_size) for i in columns}
    title = "The expert with the largest weight for each patch; gray: no routed expert"
    side = max(PANEL, LEGIBLE * max(images.shape[1:3]) / patch_size)
    figure, axes, shown, pixels = _beside_images(images, len(columns), show, title, side)
    for column, (i, of_patches) in enumerate(experts.items(), start=1):
        axes[0][column].set_title(f"block {i}", fontsize=SMALL)
        colors = expert_colors(collected.blocks[i].gates.shape[-1])
        palette = np.array([*map(to_rgb, colors), (GRAY,) * 3])  # the last one is for expert -1
        for row, image, own in zip(axes, pixels, of_patches[shown], strict=True):
            gray = image.mean(-1, keepdims=True)
            tinted = TINT * _of_pixels(palette[own], patch_size) + (1 - TINT) * gray
            row[column].imshow(tinted)
            for (y, x), expert in np.ndenumerate(own):
                if expert >= 0:
                    place = _center(x, patch_size), _center(y, patch_size)
                    style = dict(ha="center", va="center", fontsize=SMALL)
                    color = text_color(colors[expert])
                    row[column].text(*place, str(expert), color=color, **style)
    return figure


def _strongest(
    i: int, collected: Collected, images: Float[np.ndarray, "b h w 3"], patch_size: int
) -> Int[np.ndarray, "b i j"]:
    """The expert with the largest combine weight for each patch; -1 if none processed it."""
    block = collected.blocks[i]
    if not block.experts.shape[-1]:
        raise UsageError(f"block {i}: its router makes no choices")
    best = block.weights.argmax(-1)[..., None]
    experts = np.take_along_axis(block.experts, best, -1)[..., 0]
    return on_grid(np.where(block.kept.any(-1), experts, -1), images, patch_size, like=collected)


def _beside_images(
    images: Float[np.ndarray, "b h w 3"], columns: int, show: int, title: str, side: float = PANEL
) -> tuple[Figure, list[list[Axes]], Int[np.ndarray, "x"], Float[np.ndarray, "x h w 3"]]:
    """A figure with some images in its first column, and more columns without ticks.

    Args:
        side: of a panel, in inches.

    Returns:
        the figure, with the number of images in its title; its axes by row and column; the indices
        of the images, spread over all; and their pixels in [0, 1].
    """
    total = len(images)
    shown = np.unique(np.linspace(0, total - 1, min(show, total)).round().astype(int))
    pixels = np.clip((images[shown] + 1) / 2, 0, 1)
    title = f"{title}\n{len(shown)} of {total:,} images"
    figure, axes = panels(len(pixels), 1 + columns, size=(side, side), title=title)
    axes[0][0].set_title("image", fontsize=SMALL)
    for row, image in zip(axes, pixels, strict=True):
        row[0].imshow(image)
        for ax in row:
            ax.set(xticks=[], yticks=[])
    return figure, axes, shown, pixels


def kept_patches(
    images: Float[np.ndarray, "b h w 3"],
    collected: Mapping[str, Collected],
    *,
    block: int,
    patch_size: int,
    show: int = 6,
) -> Figure:
    """Images whose patches without a slot are grayed and crossed out, after figure 1 of V-MoE.

    The class token and registers are left out.

    Args:
        images: the collected images, in [-1, 1].
        show: number of images to show, spread over all.
        collected: the routing in each column, by the title of the column, such as a capacity.
        block: number of the sparse block.
    """
    kept = {name: _kept(each, block, images, patch_size) for name, each in collected.items()}
    title = (
        f"Patches with a slot in block {block}; crossed out: dropped\n"
        f"percentages: over {len(images):,} images"
    )
    figure, axes, shown, pixels = _beside_images(images, len(kept), show, title)
    for column, (name, mask) in enumerate(kept.items(), start=1):
        axes[0][column].set_title(f"{name}\n{mask.mean():.0%} with a slot", fontsize=SMALL)
        for row, image, own in zip(axes, pixels, mask[shown], strict=True):
            dimmed = GRAY + LEFT * (image.mean(-1, keepdims=True) - GRAY)
            row[column].imshow(np.where(_of_pixels(own[..., None], patch_size), image, dimmed))
            y, x = (_center(place, patch_size) for place in np.nonzero(~own))
            marks = 40 * patch_size / image.shape[0]  # in points
            row[column].scatter(x, y, s=marks**2, marker="x", c="black", lw=0.7, alpha=0.6)
    return figure


def _kept(
    collected: Collected, i: int, images: Float[np.ndarray, "b h w 3"], patch_size: int
) -> Bool[np.ndarray, "b i j"]:
    require(i in collected.blocks, f"use one of {list(collected.blocks)}", block=i)
    kept = collected.blocks[i].kept
    has_choices = kept.shape[-1] > 0
    require(has_choices, "a soft router processes every token, none is dropped", block=i)
    return on_grid(np.asarray(kept.any(-1)), images, patch_size, like=collected)


def _center(place: Any, patch_size: int) -> Any:
    """The pixel coordinate of the center of a row or column of patches."""
    return (place + 0.5) * patch_size - 0.5


def _of_pixels(grid: Shaped[np.ndarray, "i j x"], patch_size: int) -> Shaped[np.ndarray, "h w x"]:
    """The value of each pixel's patch."""
    return grid.repeat(patch_size, 0).repeat(patch_size, 1)


def top_patches(patches: Mapping[int, TopPatches], blocks: Sequence[int] | None = None) -> Figure:
    """The patches with the largest gates of each expert, best first, and their gates at the right.

    Args:
        patches: top patches by block, as ``vmoe.analysis.patches.find_top_patches`` returns them.
        blocks: the blocks to show; if None, at most three from early to late.
    """
    shown = early_to_late(patches, blocks, 3)
    e, x = np.max([patches[i].gates.shape for i in shown], axis=0)
    figure, axes = panels(
        1,
        len(shown),
        size=(0.34 * x + 1.2, 0.34 * e + 0.8),
        title="Patches with the largest gates of each expert, at most one per image",
    )
    for i, ax in zip(shown, axes[0], strict=True):
        e, x = patches[i].gates.shape
        pixels = np.clip((patches[i].patches + 1) / 2, 0, 1)
        frame = max(1, pixels.shape[2] // 12)  # gray, around each
        around = [(0, 0), (0, 0), (frame, frame), (frame, frame), (0, 0)]
        framed = np.pad(pixels, around, constant_values=GRAY)
        mosaic = rearrange(framed, "e x p q c -> (e p) (x q) c")
        ax.imshow(mosaic, extent=(-0.5, x - 0.5, e - 0.5, -0.5))
        ax.spines[:].set_visible(False)
        ax.set_title(f"block {i}", fontsize=NORMAL)
        ax.set_xlabel("patches, best first; their gates", fontsize=SMALL)
        ax.set_xticks([])
        label_experts(ax.yaxis, e)
        for expert, gates in enumerate(patches[i].gates):
            text = f"{gates[0]:.2f}–{gates[-1]:.2f}"
            ax.text(x - 0.35, expert, text, va="center", fontsize=SMALL)
    axes[0][0].set_ylabel("expert")
    return figure
