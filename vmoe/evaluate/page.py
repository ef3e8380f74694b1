"""The HTML page of trained models' routing on images of a data set."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vmoe.analysis import page
from vmoe.analysis.collect import Labelled
from vmoe.evaluate.plots import favourites_of
from vmoe.evaluate.routing import MeasuredRouting
from vmoe.workdir.layout import replace_text

FAVOURITES = 12  # patches per expert


class Shown(NamedTuple):
    """A model to show.

    Attributes:
        routing: on all of the data.
        few: batches of the images that the page shows.
    """

    routing: MeasuredRouting
    few: Sequence[Labelled]


def count_passes(shown: Sequence[Shown], *, remove: bool = True) -> int:
    """The largest number of calls of ``write_page``'s ``on_step``."""
    return sum(page.count_passes(each.routing.loaded.model.config, remove=remove) for each in shown)


def write_page(
    path: Path,
    shown: Sequence[Shown],
    *,
    remove: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Writes the page; of several models it shows the images of the first.

    Args:
        remove: also show predictions without each expert; see ``vmoe.analysis.page.observe``.
        on_step: called after each forward pass under a change.

    Raises:
        OSError: the file cannot be written.
    """
    own = [_joined(each.few) for each in shown]
    observed = [
        page.observe(
            routing.model_name,
            routing.loaded.model,
            *of_page,
            routing.blocks,
            favourites_of(routing.loaded, routing.batches, top=FAVOURITES),
            remove=remove,
            on_step=on_step,
        )
        for (routing, _), of_page in zip(shown, own, strict=True)
    ]
    (images, labels), first = own[0], shown[0].routing
    title = f"Routing of {' and '.join(model.name for model in observed)}"
    measured = len(next(iter(first.blocks.values())).labels)
    summary = (
        f"Data: {first.data}. {len(labels):,} images are shown; the statistics are of {measured:,}."
    )
    text = page.render(title, summary, images, labels, first.loaded.class_names, observed)
    replace_text(path, text)


def _joined(
    batches: Sequence[Labelled],
) -> tuple[Float[np.ndarray, "b h w 3"], Int[np.ndarray, "b l"]]:
    """All images that are more than padding, and their labels."""
    images, labels, valid = (np.concatenate(each) for each in zip(*batches, strict=True))
    return images[valid], labels[valid]
