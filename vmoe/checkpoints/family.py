"""A family of weights: what its files specify before an array is read; checks for all families."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from vmoe.checkpoints.arrays import ArrayFile, corrupt
from vmoe.checkpoints.stored import Origin
from vmoe.config import MoEConfig, ViTConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.train import Loss
from vmoe.errors import Failure, UsageError, VmoeError, parse_json
from vmoe.host.retry import read_regular, retried

LARGEST = 1000.0  # mean or std of pixels
WRONG = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError)

Transform = Callable[[np.ndarray], np.ndarray]
Rename = Callable[[str, tuple[int, ...]], Mapping[str, Transform]]
"""Maps the name and the shape of an array to the parameters in it: the path of each, and a function
that makes it from the array. Empty if the array is not needed. Raises a KeyError if the name is
unknown, and a ValueError if the shape does not fit the name. The path of a layer scale is the path
of its layer followed by /scale. A parameter in two arrays, joined along its last axis, has /0 and
/1 after its path."""
Pixels = tuple[Sequence[float], Sequence[float]]
"""The mean and the standard deviation by which pixels in [0, 1] are normalized."""
HALF: Pixels = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


class Family(NamedTuple):
    """What files of weights specify before an array is read.

    Attributes:
        origin: format and path of the files.
        arrays: the arrays in the files.
        rename: returns the parameters in each array.
        prepared: function from a model's image size to the preprocessing and its assumptions.
        config: the model's config, if the files have it; nothing is inferred then.
        given: fields of the config that do not follow from names and shapes.
        moe: config of the MoE layers, apart from the number of experts.
        capacity_source: where their capacity factor comes from.
        pixels: normalization of pixels; it is folded into the patch embedding, so that the model
            takes pixels in [-1, 1].
        left_out: ends of the paths of biases that the files do not have; they are 0 here.
        class_names: the class names in the files; empty if they have none.
        step: number of training steps; None if unknown.
        loss: the loss that the model was trained with.
    """

    origin: Origin
    arrays: ArrayFile
    rename: Rename
    prepared: Callable[[int], tuple[Preprocessing, list[str]]]
    config: ViTConfig | None = None
    given: Mapping[str, Any] = MappingProxyType({})
    moe: MoEConfig = MoEConfig()
    capacity_source: str = ""
    pixels: Pixels = HALF
    left_out: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()
    step: int | None = None
    loss: Loss = "softmax"


def checked_pixels(mean: Any, std: Any) -> Pixels:
    """The normalization that a file declares."""
    for name, values, least in (("mean", mean, -LARGEST), ("std", std, 1 / LARGEST)):
        triple = isinstance(values, list) and len(values) == 3
        if not triple or not all(type(x) in (int, float) and least <= x <= LARGEST for x in values):
            raise UsageError(
                f"{name} {values!r:.80} of the pixels: expected three numbers from {least:g} to "
                f"{LARGEST:g}"
            )
    return mean, std


def side_of(size: Any) -> Any:
    """The side of square images, which is given as a number or as two equal ones."""
    return size[0] if isinstance(size, list) and len(set(size)) == 1 else size


def summary(preprocessing: Preprocessing) -> str:
    """The preprocessing as a phrase, for the list of assumptions."""
    crop = preprocessing.image_size
    side = preprocessing.resize_to or crop
    what = (
        f"with the shorter side to {side}" if preprocessing.keep_aspect else f"to {side} x {side}"
    )
    cropped = f", {crop} px cropped" if side != crop else ""
    stored = "" if preprocessing.exif else ", their EXIF orientation ignored"
    return f"images resized by {preprocessing.interpolation} {what} px{cropped}{stored}"


def check_known(path: Path, field: str, value: Any, known: Collection[str]) -> None:
    """Checks that the value of a field is one of those known.

    Raises:
        UsageError: it is another; the message has those that can be opened.
    """
    if value not in known:
        opened = ", ".join(known) or "only models without it"
        problem = f"{field} {value!r:.40} cannot be represented; opened are {opened}"
        raise UsageError(f"{path}: {problem}")


def read_json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is no such file."""
    try:
        content = parse_json(retried(path, lambda: read_regular(path)))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise corrupt(path, error) from None
    if not isinstance(content, dict):
        raise corrupt(path, "no JSON object")
    return content


@contextlib.contextmanager
def corrupt_if_wrong(path: Path) -> Iterator[None]:
    """Turns errors about unexpected content into a Failure with the path of the file."""
    try:
        yield
    except VmoeError:
        raise
    except WRONG as error:
        raise corrupt(path, error) from None
