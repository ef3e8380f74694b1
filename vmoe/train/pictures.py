"""Pictures of a run: training images as the model gets them, and the worst errors of evaluations.

A picture is a sheet of tiles: images, each with a few lines of text below it.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from vmoe.config.preprocessing import Preprocessing
from vmoe.data.pipeline import evaluation_batches
from vmoe.data.reading import READING, Reading
from vmoe.data.sources import Source
from vmoe.data.sources.views import Subset
from vmoe.errors import one_line
from vmoe.evaluate import Evaluation
from vmoe.evaluate.metrics import PerExample
from vmoe.nn.inputs import has_label

Picture = UInt8[np.ndarray, "h w 3"]

EXAMPLES = 32  # images of a batch that are shown
ERRORS = 16  # errors of an evaluation that are shown
COLUMNS = 8
SMALLEST, LARGEST = 144, 192  # sides in pixels: smaller images are enlarged, larger ones shrunk
MARGIN, FONT_SIZE, LINE_HEIGHT = 6, 11, 14
CLASSES = 3  # classes of an image that are named
SHOWN_WEIGHT = 0.05  # a class of less weight is not named
FULL_WEIGHT = 0.995  # a class of at least this weight is named without its number


class Tile(NamedTuple):
    """An image of a sheet.

    Attributes:
        lines: lines of text below it; longer ones are cut off at the width of the image.
    """

    pixels: Picture
    lines: Sequence[str]


def examples(
    images: Float[np.ndarray, "b h w 3"],
    targets: Float[np.ndarray, "b y"],
    class_names: Sequence[str],
) -> list[Tile]:
    """The first images of a batch, as the model gets them, with the weights of their classes.

    Args:
        images: in [-1, 1].
        targets: the weight of each class.
    """
    pixels = np.clip(np.round((images[:EXAMPLES] + 1) * 127.5), 0, 255).astype(np.uint8)
    lines = [_weights(target, class_names) for target in targets[:EXAMPLES]]
    return [Tile(*each) for each in zip(pixels, lines, strict=True)]


def worst_errors(
    result: Evaluation,
    source: Source,
    preprocessing: Preprocessing,
    reading: Reading = READING,
) -> list[Tile]:
    """The wrongly classified images with the largest losses, the worst one first.

    Each tile has the probabilities of the true and of the predicted class; if an image has several
    classes, the name of the first and the geometric mean of all. Images without a label are left
    out.

    Args:
        result: an evaluation of the source with this preprocessing.
        reading: how the images are read; in one batch.

    Raises:
        UsageError: an image cannot be read.
    """
    metrics = PerExample(*map(np.asarray, result.per_example))
    wrong = np.flatnonzero(~metrics.correct & has_label(metrics.labels))
    worst = wrong[np.argsort(-metrics.cross_entropy[wrong], kind="stable")][:ERRORS]
    if not len(worst):
        return []
    (batch,) = evaluation_batches(
        Subset(source, result.indices[worst]),
        preprocessing,
        dataclasses.replace(reading, batch_size=len(worst)),
        shuffled=False,
    )
    pixels, tiles = np.round(batch.images).astype(np.uint8), []
    for row, i in enumerate(worst):
        if batch.valid[row]:
            true, predicted = int(metrics.labels[i, 0]), int(metrics.predictions[i])
            lines = (
                f"true {metrics.label_probability[i]:.1%}: {_name(true, result.class_names)}",
                f"pred {metrics.confidence[i]:.1%}: {_name(predicted, result.class_names)}",
            )
            tiles.append(Tile(pixels[row], lines))
    return tiles


def sheet(tiles: Sequence[Tile]) -> Picture:
    """Tiles of one size in rows, on white.

    Args:
        tiles: at least one.
    """
    shown = [_scaled(tile.pixels) for tile in tiles]
    width, height = shown[0].width + MARGIN, shown[0].height + MARGIN
    height += LINE_HEIGHT * max(len(tile.lines) for tile in tiles)
    columns = min(COLUMNS, len(tiles))
    rows = -(-len(tiles) // columns)
    canvas = Image.new("RGB", (columns * width + MARGIN, rows * height + MARGIN), "white")
    draw = ImageDraw.Draw(canvas)
    for i, (image, tile) in enumerate(zip(shown, tiles, strict=True)):
        x, y = MARGIN + i % columns * width, MARGIN + i // columns * height
        canvas.paste(image, (x, y))
        for line, text in enumerate(tile.lines):
            place = (x, y + image.height + line * LINE_HEIGHT)
            draw.text(place, _cut(text, image.width), fill="black", font=_font())
    return np.asarray(canvas)


def _scaled(pixels: Picture) -> Image.Image:
    """The image, in a size at which its pixels and its text are visible."""
    image = Image.fromarray(pixels)
    factor = -(-SMALLEST // image.width)
    if factor > 1:
        size = (image.width * factor, image.height * factor)
        return image.resize(size, Image.Resampling.NEAREST)
    image.thumbnail((LARGEST, LARGEST))
    return image


def _weights(target: Float[np.ndarray, "y"], class_names: Sequence[str]) -> list[str]:
    """The classes of a target, the largest weight first: at most three, and how many more."""
    classes = [i for i in np.argsort(-target, kind="stable") if target[i] >= SHOWN_WEIGHT]
    lines = [
        f"{f'{target[i]:.0%}: ' if target[i] < FULL_WEIGHT else ''}{_name(int(i), class_names)}"
        for i in classes[:CLASSES]
    ]
    more = len(classes) - CLASSES
    return [*lines, f"and {more} more"] if more > 0 else lines


def _name(index: int, class_names: Sequence[str]) -> str:
    """The name of a class, or the number of a logit that has no class."""
    return class_names[index] if index < len(class_names) else f"logit {index}"


def _cut(text: str, width: int) -> str:
    """The beginning of a text, at most ``width`` pixels wide."""
    text = one_line(text)
    while _font().getlength(text) > width:
        text = f"{text[:-2]}…"
    return text


@functools.cache
def _font() -> ImageFont.FreeTypeFont:
    """The font that comes with matplotlib; it has most alphabets."""
    import matplotlib  # takes long, and most commands need no font

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(path, FONT_SIZE)
