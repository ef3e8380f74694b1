"""Makes a data set in the ArrayRecord form of TFDS from a folder of images.

    python -m scripts.prepare.folder photos data/tfds/photos
    python -m scripts.prepare.folder --whole photos data/tfds/photos    # all of it as train
    vmoe train ... --data.name tfds:./data/tfds/photos

The folder has the form of ``folder:PATH``: a sub-folder per class, with or without folders for the
splits (``train`` etc.). The new data set has the same splits and classes. A folder without splits
becomes on average 80% train, 10% validation and 10% test. With ``--whole`` all images go into
``train``, for configs that hold out a slice of it, such as ``train[:102400]``; a class may then
have only one image.

Images are copied unchanged, without TensorFlow. Their names are in memory, a few hundred bytes per
image. A few large files are faster to read than many small ones, and work on more kinds of storage.
The same command resumes after it was stopped.
"""

import argparse
from pathlib import Path
from typing import Any

from vmoe.host import signals

if __name__ == "__main__":
    signals.exit_at_once()  # before the imports, which take seconds

import numpy as np

from scripts.prepare.array_record import Split, check_name, is_complete, write
from vmoe.data.sources import SPLITS, Source, open_splits
from vmoe.data.sources.folder import open_folder, split_folders
from vmoe.errors import VmoeError


def split_of(source: Any, folder: Path) -> Split:
    """The images of a source of files."""
    files = [source.path(i) for i in range(len(source))]
    names = [str(Path(file).relative_to(folder)) for file in files]

    def read(i: int) -> bytes:
        image = source[i].image
        assert isinstance(image, bytes)
        return image

    return Split(
        names,
        np.array([Path(file).stat().st_size for file in files]),
        np.arange(len(files)),
        read,
        lambda i: {"label": source.labels_of(i)[0], "file_name": names[i]},
    )


def every_split(folder: Path) -> dict[str, Source]:
    """The splits of a folder as training reads them."""
    stored = split_folders(folder)
    wanted = [
        split
        for split in SPLITS
        if not stored or split in stored or (split == "validation" and "train" in stored)
    ]
    return dict(zip(wanted, open_splits(f"folder:{folder}", wanted), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder of images, in a sub-folder per class")
    parser.add_argument("destination", type=Path, help="new folder, named as the data set")
    parser.add_argument("--whole", action="store_true", help="write all images to the split train")
    options = parser.parse_args()
    folder: Path = options.folder
    name, version = options.destination.name, options.destination / "1.0.0"
    check_name(name)
    if is_complete(version):
        return
    try:
        if options.whole:
            sources = {"train": open_folder(str(folder), ["train"], whole=True)[0]}
        else:
            sources = every_split(folder)
        splits = {split: split_of(source, folder) for split, source in sources.items()}
        import tensorflow_datasets as tfds  # takes seconds

        features = {
            "label": tfds.features.ClassLabel(names=list(next(iter(sources.values())).class_names)),
            "file_name": tfds.features.Text(),
        }
        write(version, name, features, splits)
    except (VmoeError, PermissionError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
