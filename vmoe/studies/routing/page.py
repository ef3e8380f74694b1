"""The HTML page of trained models' routing on images of a data set."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vmoe.analysis import page
from vmoe.studies.routing.measure import MeasuredRouting
from vmoe.workdir.layout import replace_text


def count_passes(measured: Sequence[MeasuredRouting], *, remove: bool = True) -> int:
    """The largest number of calls of ``write_page``'s ``on_step``."""
    return sum(page.count_passes(each.loaded.model.config, remove=remove) for each in measured)


def write_page(
    path: Path,
    measured: Sequence[MeasuredRouting],
    *,
    images: int = 64,
    remove: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Writes the page of some models on the same data.

    Args:
        images: number of images to show, the first of the measured ones. They are in the same
            groups if this number and the batch size are multiples of the images per group.
        remove: also show predictions without each expert; see ``vmoe.analysis.page.observe``.
        on_step: called after each forward pass under a change.
    """
    shown = [each.first(images) for each in measured]
    observed = [
        page.observe(
            routing.model_name,
            routing.loaded.model,
            pixels,
            routing.labels[: len(pixels)],
            routing.blocks,
            routing.top_patches,
            sigmoid=routing.loaded.sigmoid,
            remove=remove,
            on_step=on_step,
        )
        for routing, pixels in zip(measured, shown, strict=True)
    ]
    pixels, first = shown[0], measured[0]
    labels = first.labels[: len(pixels)]
    title = f"Routing of {' and '.join(model.name for model in observed)}"
    summary = (
        f"Data: {first.data}. Statistics are over {len(first.labels):,} images; the first "
        f"{len(labels):,} of them are shown."
    )
    text = page.render(title, summary, pixels, labels, first.loaded.class_names, observed)
    replace_text(path, text)
