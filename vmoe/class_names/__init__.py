"""The class names of ImageNet, in the order of the logits of published checkpoints.

A file ``NAME.txt.gz`` has a line for each class: its synset of WordNet 3.0 (``LICENSE.wordnet``)
and the synset's lemmas, which are synonyms. The classes and their order are those of timm's package
data, where the list of 21,843 classes is Google's.
"""

import functools
import gzip
from collections import Counter
from importlib import resources

from vmoe.errors import UsageError, unknown

NAMES = ("imagenet_1k", "imagenet_21k")


@functools.cache
def class_names(name: str) -> tuple[str, ...]:
    """The 1,000 or 21,843 distinct class names of a data set.

    A class is named by its first lemma. Where classes of the data set share that, they are named by
    all their lemmas; where they share these, too, with the synset added.

    Args:
        name: ``imagenet_1k`` or ``imagenet_21k``.

    Raises:
        UsageError: no such data set.

    >>> names = class_names("imagenet_1k")
    >>> names[0], names[134], names[639]
    ('tench', 'crane (n02012849)', 'maillot, tank suit')
    """
    rows = [
        (lemmas.split(", ")[0], lemmas, f"{lemmas} ({synset})") for synset, lemmas in _lines(name)
    ]  # the spellings of a class, from short to long
    counts = [Counter(column) for column in zip(*rows, strict=True)]
    return tuple(
        next(spelling for spelling, count in zip(row, counts, strict=True) if count[spelling] == 1)
        for row in rows
    )


def synsets(name: str) -> tuple[str, ...]:
    """The WordNet synsets of the classes, which name ImageNet's folders, in the same order.

    Args:
        name: ``imagenet_1k`` or ``imagenet_21k``.

    Raises:
        UsageError: no such data set.

    >>> synsets("imagenet_1k")[0]
    'n01440764'
    """
    return tuple(synset for synset, _ in _lines(name))


@functools.cache
def _lines(name: str) -> list[tuple[str, str]]:
    """The synset and the lemmas of each class."""
    if name not in NAMES:
        raise UsageError(unknown("no class names of", name, list(NAMES)))
    packed = resources.files(__name__).joinpath(f"{name}.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode().splitlines()
    return [(synset, lemmas) for synset, _, lemmas in (line.partition("\t") for line in lines)]
