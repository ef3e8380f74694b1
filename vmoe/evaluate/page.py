"""The HTML page of trained models' routing on images of a data set."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vmoe.analysis import BlockStatistics, page
from vmoe.analysis.collect import Labelled
from vmoe.evaluate.plots import Batches, favourites_of
from vmoe.factory import Loaded
from vmoe.workdir.layout import replace_text

FAVOURITES = 12  # patches per expert


class Shown(NamedTuple):
    """A model to show.

    Attributes:
        name: of the model, for people.
        batches: gives the batches of the data.
        few: batches of the images that the page shows.
        blocks: the statistics of the data by sparse block.
    """

    name: str
    loaded: Loaded
    batches: Batches
    few: Sequence[Labelled]
    blocks: Mapping[int, BlockStatistics]


def count_passes(shown: Sequence[Shown], *, remove: bool = True) -> int:
    """The largest number of calls of ``write_page``'s ``on_step``."""
    return sum(page.count_passes(each.loaded.model.config, remove=remove) for each in shown)


def write_page(
    path: Path,
    data: str,
    shown: Sequence[Shown],
    *,
    remove: bool = True,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Writes the page; of several models it shows the images of the first.

    Args:
        data: name of the data, for people.
        remove: also show predictions without each expert; see ``vmoe.analysis.page.observe``.
        on_step: called after each forward pass under a change.

    Raises:
        OSError: the file cannot be written.
    """
    own = [mixed(each.few) for each in shown]
    observed = [
        page.observe(
            each.name,
            each.loaded.model,
            *of_page,
            each.blocks,
            favourites_of(each.loaded, each.batches, top=FAVOURITES),
            remove=remove,
            on_step=on_step,
        )
        for each, of_page in zip(shown, own, strict=True)
    ]
    images, labels = own[0]
    title = f"Routing of {' and '.join(model.name for model in observed)}"
    summary = f"{data}; {len(labels)} of them are on this page"
    text = page.render(title, summary, images, labels, shown[0].loaded.class_names, observed)
    replace_text(path, text)


def mixed(
    batches: Sequence[Labelled],
) -> tuple[Float[np.ndarray, "b h w 3"], Int[np.ndarray, "b"]]:
    """Images in random order, so that classes are mixed in each group, and their classes."""
    images, labels, valid = (np.concatenate(each) for each in zip(*batches, strict=True))
    order = np.random.default_rng(0).permutation(np.flatnonzero(valid))
    return images[order], labels[order]
