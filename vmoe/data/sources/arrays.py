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

from vmoe.data.sources.source import SPLITS, Source, rgb, shares
from vmoe.errors import UsageError


def open_arrays(path: str, split: str) -> Source:
    """A split of a NumPy file.

    Raises:
        UsageError: no such file or split, or arrays that are not as described above.
    """
    place = f"arrays:{path}"
    arrays = _load(path)
    own = [name for name in SPLITS if f"{name}_images" in arrays]
    if not own:
        images, labels = _pair(arrays, "", place)
        parts = {"validation": 0.1, "test": 0.1}
    elif split in ("train", "validation") and "validation" not in own and "train" in own:
        images, labels = _pair(arrays, "train_", place)
        parts = {"validation": 0.1}
    elif split in own:
        images, labels = _pair(arrays, f"{split}_", place)
        parts = {}
    else:
        raise UsageError(f"{place} has no part {split!r}, there are {', '.join(own)}")
    names = _names(arrays, labels, place)
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
    if images.dtype != np.uint8 or not (images.ndim == 3 or images.shape[3:] == (3,)):
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


def _names(arrays: dict[str, np.ndarray], labels: np.ndarray, place: str) -> tuple[str, ...]:
    if "class_names" in arrays:
        names = tuple(str(name) for name in arrays["class_names"])
    else:
        all_labels = [x for name, x in arrays.items() if name.endswith("labels")]
        names = tuple(str(i) for i in range(max(int(x.max()) for x in all_labels) + 1))
    if labels.max() >= len(names):
        raise UsageError(f"{place}: label {labels.max()}, and class_names has {len(names)}")
    return names
