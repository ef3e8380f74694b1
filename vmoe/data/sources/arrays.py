"""Images in one NumPy file.

    images, labels               split by share: of each class 80% train, 10% validation, 10% test
    train_images, train_labels,  split as named (train, validation, test); validation is taken out
    test_images, ...             of train, 10%, where it is not there
    class_names                  if there are any

Images are uint8, (b, h, w, 3), (b, h, w, 1) or (b, h, w); labels are integers from 0.
"""

import zipfile
import zlib

import numpy as np

from vmoe.data.sources.source import SPLITS, Source, part_of, rgb, shares
from vmoe.errors import UsageError

LARGEST = 1_000_000  # classes; a label beyond is an id


def open_arrays(path: str, split: str) -> Source:
    """A split of a NumPy file.

    Raises:
        UsageError: no such file or split, or arrays that are not as described above.
    """
    place = f"arrays:{path}"
    arrays = _load(path)
    own = [name for name in SPLITS if f"{name}_images" in arrays]
    pairs = {name: _pair(arrays, f"{name}_" if name else "", place) for name in own or [""]}
    names = _names(arrays, [labels for _, labels in pairs.values()], place)
    part, parts = part_of(split, own, place)
    images, labels = pairs[part]
    if parts:
        index = shares(labels, parts, names=names, place=place)[split]
        images, labels = images[index], labels[index]
    return Source(f"{place}:{split}", images, labels, names)


def _load(path: str) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            found = np.load(file, allow_pickle=False)
            if isinstance(found, np.ndarray):
                raise UsageError(f"arrays:{path}: one array; np.savez makes a file of several")
            return {name: found[name] for name in found.files}
    except FileNotFoundError:
        raise UsageError(f"arrays:{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"arrays:{path}: not a whole .npz of plain arrays ({error})") from None


def _pair(arrays: dict[str, np.ndarray], prefix: str, place: str) -> tuple[np.ndarray, np.ndarray]:
    for name in (f"{prefix}images", f"{prefix}labels"):
        if name not in arrays:
            known = ", ".join(arrays) or "nothing"
            raise UsageError(f"{place}: no array {name!r}, there are {known}")
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    fits = images.ndim == 3 or images.shape[3:] == (3,)
    if images.dtype != np.uint8 or not fits or not all(images.shape[1:]):
        raise UsageError(
            f"{place}: {prefix}images is {images.dtype} {images.shape}, uint8 (b, h, w, 3) or "
            "(b, h, w) is wanted"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UsageError(
            f"{place}: {prefix}labels is {labels.dtype} {labels.shape}, an integer for each of "
            f"the {len(images)} images is wanted"
        )
    if not len(labels) or labels.min() < 0:
        raise UsageError(f"{place}: {prefix}labels count from 0, and there is at least one")
    return (rgb(images) if images.ndim == 3 else images), labels.astype(np.int64)


def _names(arrays: dict[str, np.ndarray], labels: list[np.ndarray], place: str) -> tuple[str, ...]:
    largest = max(int(some.max()) for some in labels)
    if "class_names" not in arrays:
        if largest >= LARGEST:
            raise UsageError(f"{place}: label {largest}; labels count the classes from 0")
        return tuple(str(i) for i in range(largest + 1))
    given = arrays["class_names"]
    names = tuple(map(str, given.reshape(-1)))
    if given.ndim != 1 or len(set(names)) < len(names):
        raise UsageError(f"{place}: class_names is a list of names that differ")
    if largest >= len(names):
        raise UsageError(f"{place}: label {largest}, and class_names has {len(names)}")
    return names
