"""Makes a data set in the ArrayRecord form of TFDS from a folder of images.

    python scripts/prepare_folder.py photos data/tfds/photos
    vmoe train ... --data.name tfds:./data/tfds/photos

The folder is one that ``folder:PATH`` names: a sub-folder per class, split into ``train`` and so on
or not. The new data set has the same splits and classes. Images are copied unchanged, without
TensorFlow. A few large files are read faster, and from more kinds of storage, than many small ones.
The same command resumes after it was stopped.
"""

import argparse
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds
from preparation.array_record import Split, check_name, is_complete, write

from vmoe.data.sources import SPLITS, Source, open_source
from vmoe.data.sources.folder import split_folders
from vmoe.errors import UsageError


def split_of(source: Source, folder: Path) -> Split:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of images, in a sub-folder per class")
    parser.add_argument("destination", type=Path, help="of the data set; its name is the last part")
    options = parser.parse_args()
    folder: Path = options.folder
    name, version = options.destination.name, options.destination / "1.0.0"
    check_name(name)
    if is_complete(version):
        return
    stored = split_folders(folder)
    wanted = [
        split
        for split in SPLITS
        if not stored or split in stored or (split == "validation" and "train" in stored)
    ]
    try:
        sources = {split: open_source(f"folder:{folder}", split) for split in wanted}
        splits = {split: split_of(source, folder) for split, source in sources.items()}
        features = {
            "label": tfds.features.ClassLabel(names=list(sources[wanted[0]].class_names)),
            "file_name": tfds.features.Text(),
        }
        write(version, name, features, splits)
    except UsageError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
