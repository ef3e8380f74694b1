"""Writes four small tables for the experiment ``mixtures``, from a PyPI and two Debian packages.

    python -m venv .cache/mixtures
    .cache/mixtures/bin/pip install praat-parselmouth==0.4.7 rdata==1.1.0
    apt-get download r-cran-mixtools r-cran-flexmix
    for package in r-cran-*.deb; do dpkg -x "$package" .cache/debian; done
    .cache/mixtures/bin/python -m scripts.prepare.mixtures data/mixtures --debian .cache/debian

praat-parselmouth (GPL-3) makes the vowels of Peterson & Barney (1952): 76 speakers say ten vowels
twice. mixtools (GPL-2 or later) has tone perception (150 rows) and nitrogen oxides (88), flexmix
(GPL-2 or later) has NPreg (200). The tables are for this machine alone: the repository has their
SHA-256, which this script checks. The folder gets a file with the sources and licenses.
"""

import argparse
import csv
import hashlib
import io
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

R_DATA = {  # by table: the file in the folder of Debian's packages, and its columns
    "tone": ("mixtools/data/tonedata.RData", ("stretchratio", "tuned")),
    "no": ("mixtools/data/NOdata.RData", ("NO", "Equivalence")),
    "npreg": ("flexmix/data/NPreg.RData", ("x", "yn", "yp")),
}
LIBRARY = Path("usr", "lib", "R", "site-library")
CHECKSUMS = {
    "vowels": "5e964c5ed7f271ba4e869377387c7c5f41c0605725bcda4740040cee51f2e8b0",
    "tone": "11a7345c48ed68164246b47fb13ceb2147caa852357e47b6d622ea263e7e92a2",
    "no": "e72710aede9bce86edb307c0317fd5c6154203f40bead211fc8feb45c065d86b",
    "npreg": "e9873780fa980f21c3c1b7f3ad1b02cd54080d0de02c2a8332f4d56a164bd32a",
}
SOURCES = """Tables written by scripts/prepare/mixtures.py of vmoe. Do not distribute them with it.

vowels.csv         Peterson & Barney (1952), made by praat-parselmouth 0.4.7, GPL-3
tone.csv, no.csv   tonedata and NOdata of the R package mixtools, GPL-2 or later
npreg.csv          NPreg of the R package flexmix, GPL-2 or later
"""
Rows = Iterable[Iterable[Any]]


def vowels() -> Iterator[list[str]]:
    """The table of Peterson & Barney, with a header."""
    from parselmouth.praat import call

    table = call("Create formant table (Peterson & Barney 1952)")
    yield ["speaker", "kind", "vowel", "F0", "F1", "F2", "F3"]
    for row in range(1, call(table, "Get number of rows") + 1):
        yield [
            call(table, "Get value", row, column)
            for column in ("Speaker", "Type", "Vowel", "F0", "F1", "F2", "F3")
        ]


def r_table(file: Path, columns: tuple[str, ...]) -> Rows:
    """Columns of the only data frame of an .RData file, with a header."""
    import rdata

    with warnings.catch_warnings(action="ignore"):  # such a file does not say how it is encoded
        (frame,) = rdata.read_rda(file).values()
    yield columns
    yield from zip(*(frame[name].tolist() for name in columns), strict=True)


def as_csv(rows: Rows) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def check(tables: Mapping[str, str], known: Mapping[str, str] = CHECKSUMS) -> None:
    """Compares the tables with the ones that the stored rows were made with.

    Raises:
        SystemExit: a table differs.
    """
    for name, text in tables.items():
        if (found := hashlib.sha256(text.encode()).hexdigest()) != known[name]:
            raise SystemExit(
                f"{name}.csv: SHA-256 {found}, expected {known[name]}: other versions?"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path, help="a folder")
    parser.add_argument("--debian", type=Path, required=True, help="where dpkg -x unpacked to")
    options = parser.parse_args()
    try:
        tables = {"vowels": as_csv(vowels())}
        for name, (file, columns) in R_DATA.items():
            tables[name] = as_csv(r_table(options.debian / LIBRARY / file, columns))
    except ImportError as error:
        raise SystemExit(f"{error}; {sys.argv[0]} starts with the commands for it") from None
    except OSError as error:
        raise SystemExit(f"{error}") from None
    check(tables)
    options.destination.mkdir(parents=True, exist_ok=True)
    for name, text in tables.items():
        (options.destination / f"{name}.csv").write_text(text)
    (options.destination / "SOURCES.txt").write_text(SOURCES)
    print(f"{options.destination}: {', '.join(tables)}")


if __name__ == "__main__":
    main()
