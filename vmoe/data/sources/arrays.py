"""Images in one NumPy file.

    images, labels               not split: 80% of each class is train, 10% validation, 10% test
    train_images, train_labels,  split as named: train, validation, test; without arrays for
    test_images, ...             validation, 10% of train
    class_names                  optional

Images are uint8 (b, h, w, 3), (b, h, w, 1) or (b, h, w); labels are integers from 0. Other arrays
are ignored.
"""

import zipfile
import zlib

import numpy as np

from vmoe.data.sources.in_memory import InMemorySource, rgb
from vmoe.data.sources.splits import SPLITS, resolve_split, stratified_split
from vmoe.errors import UsageError

MOST_CLASSES = 1_000_000  # a larger label is an identifier, not the number of a class


def open_arrays(path: str, split: str) -> InMemorySource:
    """Opens a split of a NumPy file.

    Args:
        path: the .npz file.
        split: "train", "validation" or "test".

    Raises:
        UsageError: there is no such file or split, or its arrays are not as described above.
    """
    place = f"arrays:{path}"
    arrays = _load(path)
    available = [name for name in SPLITS if f"{name}_images" in arrays]
    pairs = {name: _pair(arrays, f"{name}_" if name else "", place) for name in available or [""]}
    class_names = _class_names(arrays, [labels for _, labels in pairs.values()], place)
    stored_split, fractions = resolve_split(split, available, place)
    images, labels = pairs[stored_split]
    if fractions:
        index = stratified_split(labels, fractions, class_names=class_names, place=place)[split]
        images, labels = images[index], labels[index]
    return InMemorySource(f"{place}:{split}", (place, split), images, labels, class_names)


def _load(path: str) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                raise UsageError(f"arrays:{path}: holds one array; save several with np.savez")
            return {name: loaded[name] for name in loaded.files}
    except FileNotFoundError:
        raise UsageError(f"arrays:{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(f"arrays:{path}: not a complete .npz of plain arrays ({error})") from None


def _pair(arrays: dict[str, np.ndarray], prefix: str, place: str) -> tuple[np.ndarray, np.ndarray]:
    for name in (f"{prefix}images", f"{prefix}labels"):
        if name not in arrays:
            known = ", ".join(arrays) or "nothing"
            raise UsageError(f"{place}: no array {name!r}; the file holds {known}")
    images, labels = arrays[f"{prefix}images"], arrays[f"{prefix}labels"]
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    fits = images.ndim == 3 or images.shape[3:] == (3,)
    if images.dtype != np.uint8 or not fits or not all(images.shape[1:]):
        raise UsageError(
            f"{place}: {prefix}images is {images.dtype} {images.shape}; give uint8 (b, h, w, 3) "
            "or (b, h, w)"
        )
    if not np.issubdtype(labels.dtype, np.integer) or labels.shape != images.shape[:1]:
        raise UsageError(
            f"{place}: {prefix}labels is {labels.dtype} {labels.shape}; give an integer for each "
            f"of the {len(images)} images"
        )
    if not len(labels) or labels.min() < 0:
        raise UsageError(f"{place}: {prefix}labels: give at least one, none below 0")
    return (rgb(images) if images.ndim == 3 else images), labels.astype(np.int64)


def _class_names(
    arrays: dict[str, np.ndarray], labels: list[np.ndarray], place: str
) -> tuple[str, ...]:
    largest = max(int(split_labels.max()) for split_labels in labels)
    if "class_names" not in arrays:
        if largest >= MOST_CLASSES:
            raise UsageError(f"{place}: label {largest}; number the classes from 0")
        return tuple(str(i) for i in range(largest + 1))
    given = arrays["class_names"]
    class_names = tuple(map(str, given.reshape(-1)))
    if given.ndim != 1 or len(set(class_names)) < len(class_names):
        raise UsageError(f"{place}: class_names is not a list of distinct names")
    if largest >= len(class_names):
        raise UsageError(
            f"{place}: label {largest} has no name; class_names holds {len(class_names)}, for "
            "labels from 0"
        )
    return class_names
