"""The tables that ``scripts.prepare.mixtures`` writes."""

import csv
import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

PREPARE = "python -m scripts.prepare.mixtures"


class Vowels(NamedTuple):
    """Vowels of Peterson & Barney (1952).

    Attributes:
        speakers: numbers of the speakers, (n,).
        kinds: m, w or c: men, women, children, (n,).
        vowels: codes of the vowels, such as iy, (n,).
        formants: F1, F2 and F3 in Hz, (n, 3).
    """

    speakers: np.ndarray
    kinds: np.ndarray
    vowels: np.ndarray
    formants: np.ndarray

    def of(self, names: tuple[str, ...]) -> "Vowels":
        """The rows of some vowels."""
        return Vowels(*(each[np.isin(self.vowels, names)] for each in self))


def read_vowels(folder: Path) -> Vowels:
    columns = read_columns(folder, "vowels")
    formants = np.column_stack([columns[name].astype(float) for name in ("F1", "F2", "F3")])
    return Vowels(columns["speaker"].astype(int), columns["kind"], columns["vowel"], formants)


def read_pair(folder: Path, name: str, x: str, y: str) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of numbers of a table: the input (n, 1) and the target (n,)."""
    columns = read_columns(folder, name)
    return columns[x].astype(float)[:, None], columns[y].astype(float)


def read_columns(folder: Path, name: str) -> dict[str, np.ndarray]:
    """The columns of a table as texts.

    Raises:
        SystemExit: the table is missing.
    """
    with path_of(folder, name).open(newline="") as file:
        header, *rows = csv.reader(file)
    return dict(zip(header, np.array(rows).T, strict=True))


def checksum(folder: Path, name: str) -> str:
    """The SHA-256 of a table.

    Raises:
        SystemExit: the table is missing.
    """
    return hashlib.sha256(path_of(folder, name).read_bytes()).hexdigest()


def path_of(folder: Path, name: str) -> Path:
    path = folder / f"{name}.csv"
    if not path.is_file():
        raise SystemExit(f"{path}: no such file; make it with {PREPARE}")
    return path
