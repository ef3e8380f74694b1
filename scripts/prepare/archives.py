"""The official archives of ImageNet (ILSVRC 2012): the locations of images, and the classes.

    ILSVRC2012_img_train.tar       one tar file per class, n01440764.tar, with n01440764_10026.JPEG
    ILSVRC2012_img_val.tar         ILSVRC2012_val_00000001.JPEG to ..._00050000.JPEG
    ILSVRC2012_devkit_t12.tar.gz   data/meta.mat: identifiers, synsets and numbers of images;
                                   data/ILSVRC2012_validation_ground_truth.txt: an identifier a line

Labels are the positions of the classes in the order of their synsets.
"""

import io
import os
import re
import tarfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vmoe.host.progress import tracked


class Classes(NamedTuple):
    """The classes of the devkit.

    Attributes:
        synsets: synsets of the classes, in the order of the labels.
        counts: number of training images of each.
        validation: labels of the validation images, in the order of their numbers.
    """

    synsets: list[str]
    counts: list[int]
    validation: list[int]


class Archive(NamedTuple):
    """The images in an archive.

    Attributes:
        path: path of the archive.
        names: names of the images.
        offsets: offsets of the images in the archive.
        sizes: sizes of the images in bytes.
    """

    path: Path
    names: list[str]
    offsets: np.ndarray
    sizes: np.ndarray

    def read(self, index: int) -> bytes:
        """The bytes of an image.

        Raises:
            SystemExit: the archive is truncated.
        """
        with open(self.path, "rb") as file:
            content = os.pread(file.fileno(), int(self.sizes[index]), int(self.offsets[index]))
        if len(content) < self.sizes[index]:
            raise SystemExit(f"{self.path}: truncated at {self.names[index]}; get it again")
        return content


def read_devkit(path: Path) -> Classes:
    """The classes, and the labels of the validation images.

    Raises:
        SystemExit: the archive is truncated or incomplete.
    """
    from scipy.io import loadmat

    try:
        with tarfile.open(path) as archive:
            members = {os.path.basename(name): name for name in archive.getnames()}
            meta, truth = (
                _content(archive, members[name])
                for name in ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
            )
        synsets = loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
        leaves = synsets[synsets["num_children"] == 0]
        leaves = leaves[np.argsort(leaves["WNID"].astype(str))]
        labels = {int(number): i for i, number in enumerate(leaves["ILSVRC2012_ID"])}
        return Classes(
            leaves["WNID"].astype(str).tolist(),
            leaves["num_train_images"].astype(int).tolist(),
            [labels[int(line)] for line in truth.split()],
        )
    except (OSError, EOFError, KeyError, ValueError, IndexError, tarfile.TarError) as error:
        raise SystemExit(f"{path}: is not the devkit, or is truncated ({error!r})") from None


def _content(archive: tarfile.TarFile, name: str) -> bytes:
    """The bytes of a file.

    Raises:
        KeyError: it is no file.
    """
    if (file := archive.extractfile(name)) is None:
        raise KeyError(name)
    return file.read()


def find_training(path: Path, classes: Classes) -> tuple[Archive, list[int]]:
    """The training images and their labels.

    Raises:
        SystemExit: the archive is truncated, or the number of images of a class differs from the
            devkit.
    """
    names, offsets, sizes, labels = [], [], [], []
    label = {synset: i for i, synset in enumerate(classes.synsets)}
    try:
        with tarfile.open(path, "r:") as outer:
            for member in tracked(outer, f"reading {path.name}", len(label)):
                synset = Path(member.name).stem
                if synset not in label:
                    raise SystemExit(f"{path}: {member.name} is not a class of the devkit")
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    images = [each for each in inner if each.isfile()]
                names += [each.name for each in images]
                offsets += [member.offset_data + each.offset_data for each in images]
                sizes += [each.size for each in images]
                labels += [label[synset]] * len(images)
    except (OSError, tarfile.TarError) as error:
        raise SystemExit(f"{path}: truncated, or no archive of this kind ({error})") from None
    found = Counter(labels)
    for i, (synset, count) in enumerate(zip(classes.synsets, classes.counts, strict=True)):
        if found[i] != count:
            raise SystemExit(f"{path}: class {synset} has {found[i]:,} of {count:,} images")
    return Archive(path, names, np.array(offsets), np.array(sizes)), labels


def find_validation(path: Path, count: int) -> Archive:
    """The validation images, in the order of their numbers.

    Raises:
        SystemExit: the archive is truncated, or has another number of images.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            shown = tracked(archive, f"reading {path.name}", count)
            members = sorted((each for each in shown if each.isfile()), key=lambda each: each.name)
    except (OSError, tarfile.TarError) as error:
        raise SystemExit(f"{path}: truncated, or no archive of this kind ({error})") from None
    numbers = [re.search(r"_(\d+)\.\w+$", each.name) for each in members]
    if [each and int(each[1]) for each in numbers] != list(range(1, count + 1)):
        raise SystemExit(f"{path}: {len(members):,} of {count:,} numbered images; get it again")
    return Archive(
        path,
        [os.path.basename(each.name) for each in members],
        np.array([each.offset_data for each in members]),
        np.array([each.size for each in members]),
    )
