"""Makes a data set of emoji, 64 x 64 pixels in nine categories, from two npm packages.

    python -m scripts.prepare.emoji data/emoji                         # calls npm pack: 136 MB
    python -m scripts.prepare.emoji data/emoji --google FOLDER --twitter FOLDER   # unpacked ones

The packages are emoji-datasource-google and emoji-datasource-twitter, 16.0.0. Each drawing is
composited on white and written as ``SPLIT/CATEGORY/NAME-VENDOR.png``. A hash of an emoji's name
decides its split (80% train, 10% validation, 10% test on average), so that both vendors' drawings
of an emoji are in one split. ``--skin-tones`` adds the drawings with skin tones to the training
images. People are then 61% of them, and a model was less accurate (60.1% instead of 67.2% on
validation, one seed). The five skin tones drawn alone are left out. Nothing is written if the
folder exists.

The folder also has three lists for ``manifest:``, of the drawings without skin tones. google.csv
and twitter.csv have the category of each drawing. google_words.csv has the words of the emoji's
name and sub-category, without stop words and without words that fewer than 10 of Google's training
drawings have. A few held-out emoji look exactly like a training emoji with another name, such as
the flags of Bouvet Island and Norway: they are in no list.

The drawings are Noto Color Emoji by Google (Apache License 2.0) and Twemoji by Twitter and
contributors (CC-BY 4.0). The folder gets a file with the sources and licenses.
"""

import argparse
import collections
import csv
import hashlib
import json
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from vmoe.data.decode import open_image
from vmoe.host.signals import exit_at_once, temporary_folder

VENDORS = ("google", "twitter")
VERSION = "16.0.0"
LEFT_OUT = "Component"  # the category of skin tones drawn alone
STOP_WORDS = {"and", "for", "in", "of", "on", "or", "other", "the", "to", "with"}
MIN_DRAWINGS = 10  # of the training split that have a word
SOURCES = """Drawings of emoji, composited on white by scripts/prepare/emoji.py of vmoe.

*-google.png   Noto Color Emoji, (c) Google, Apache License 2.0
*-twitter.png  Twemoji, (c) Twitter, Inc and other contributors, CC-BY 4.0

They come from the npm packages emoji-datasource-google and emoji-datasource-twitter 16.0.0.
"""


class Drawing(NamedTuple):
    """One drawing of an emoji.

    Attributes:
        emoji: the name of the emoji, without its skin tone.
        name: the name of this drawing.
        category: the category of the emoji.
        words: the words of its name and sub-category, in lower case, without stop words.
        file: the PNG file.
        base: True for a drawing without a skin tone.
    """

    emoji: str
    name: str
    category: str
    words: tuple[str, ...]
    file: Path
    base: bool


class Listed(NamedTuple):
    """A drawing that was written.

    Attributes:
        path: relative to the data set.
        pixels: the hash of the pixels.
    """

    drawing: Drawing
    vendor: str
    split: str
    path: str
    pixels: str


def download(vendor: str, folder: Path) -> Path:
    """Downloads a vendor's package with npm, and unpacks its list and its drawings."""
    package = f"emoji-datasource-{vendor}@{VERSION}"
    print(f"downloading {package} with npm pack", file=sys.stderr, flush=True)
    command = ["npm", "pack", "--silent", package]
    try:
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"{' '.join(command)}: {error}; or give --{vendor} FOLDER") from None
    wanted = ("package/emoji.json", f"package/img/{vendor}/64/")
    with tarfile.open(folder / f"emoji-datasource-{vendor}-{VERSION}.tgz") as archive:
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(folder / vendor, members, filter="data")
    return folder / vendor / "package"


def drawings(package: Path, vendor: str) -> Iterator[Drawing]:
    """The drawings of an unpacked package.

    Raises:
        SystemExit: emoji.json is missing or malformed.
    """
    try:
        emoji = json.loads((package / "emoji.json").read_text())
    except (OSError, ValueError) as error:
        raise SystemExit(f"{package / 'emoji.json'}: {error}; give the unpacked package") from None
    images = package / "img" / vendor / "64"
    for each in emoji:
        if each["category"] == LEFT_OUT:
            continue
        words = words_of(each["name"], each["subcategory"])
        toned = each.get("skin_variations", {}).values()
        for drawn in (each, *toned):
            if drawn[f"has_img_{vendor}"]:
                file = images / drawn["image"]
                name = f"{file.stem}-{vendor}"
                yield Drawing(
                    each["short_name"], name, each["category"], words, file, drawn is each
                )


def words_of(*texts: str) -> tuple[str, ...]:
    """The distinct words of texts, in lower case, without stop words."""
    words = re.findall("[a-z]+", " ".join(texts).lower())
    return tuple(word for word in dict.fromkeys(words) if word not in STOP_WORDS)


def split_of(emoji: str) -> str:
    """The split of an emoji, by a hash of its name."""
    tenth = int(hashlib.sha256(emoji.encode()).hexdigest(), 16) % 10
    return {8: "validation", 9: "test"}.get(tenth, "train")


def prepare(packages: dict[str, Path], destination: Path, *, skin_tones: bool) -> dict[str, int]:
    """Writes the data set; returns the number of images of each split."""
    counts: dict[str, int] = collections.Counter()
    listed = []
    for vendor, package in packages.items():
        for drawing in drawings(package, vendor):
            split = split_of(drawing.emoji)
            if not drawing.base and not (skin_tones and split == "train"):
                continue
            path = Path(split, drawing.category, f"{drawing.name}.png")
            pixels = write_image(drawing.file, destination / path)
            counts[split] += 1
            if drawing.base:
                listed.append(Listed(drawing, vendor, split, path.as_posix(), pixels))
    write_lists(without_copies(listed), destination)
    (destination / "SOURCES.txt").write_text(SOURCES)
    return counts


def write_image(source: Path, target: Path) -> str:
    """Writes a drawing on white, and returns the hash of its pixels."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with source.open("rb") as file, open_image(file, str(source)) as drawing:
            rgba = drawing.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        image = Image.alpha_composite(white, rgba).convert("RGB")
        image.save(target)
    except OSError as error:
        raise SystemExit(f"{source}: {error}") from None
    return hashlib.sha256(image.tobytes()).hexdigest()


def emoji_of(origins: Iterable[str]) -> list[str]:
    """The emoji of each image, of which both vendors' drawings are alike.

    Models tend to be right on both or wrong on both, so an emoji is one observation of an accuracy.

    Args:
        origins: paths of drawings; an image from elsewhere is the only one of its kind.
    """
    stems = ((origin, *Path(origin).stem.rpartition("-")) for origin in origins)
    return [name if vendor in VENDORS else origin for origin, name, _, vendor in stems]


def without_copies(listed: Sequence[Listed]) -> list[Listed]:
    """Leaves out held-out emoji with a drawing that equals a drawing of the training split."""
    seen = {each.pixels for each in listed if each.split == "train"}
    held_out = (each for each in listed if each.split != "train")
    copies = {each.drawing.emoji for each in held_out if each.pixels in seen}
    return [each for each in listed if each.drawing.emoji not in copies]


def write_lists(listed: Sequence[Listed], destination: Path) -> None:
    """Writes the categories of every vendor's drawings, and the words of the first vendor's."""
    of = {vendor: [each for each in listed if each.vendor == vendor] for vendor in VENDORS}
    for vendor, own in of.items():
        rows = ((each.path, each.drawing.category, each.split) for each in own)
        write_list(destination / f"{vendor}.csv", "label", rows)
    first = VENDORS[0]
    train = (each.drawing.words for each in of[first] if each.split == "train")
    counts = collections.Counter(word for words in train for word in words)
    frequent = {word for word, count in counts.items() if count >= MIN_DRAWINGS}
    rows = (
        (each.path, "|".join(word for word in each.drawing.words if word in frequent), each.split)
        for each in of[first]
    )
    write_list(destination / f"{first}_words.csv", "labels", rows)


def write_list(file: Path, label: str, rows: Iterable[Sequence[str]]) -> None:
    """Writes a list for ``manifest:``; its rows are a path, labels and a split."""
    with file.open("w", newline="") as text:
        csv.writer(text).writerows([("path", label, "split"), *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path, help="a new folder")
    for vendor in VENDORS:
        parser.add_argument(f"--{vendor}", type=Path, help="the unpacked package; else npm pack")
    parser.add_argument("--skin-tones", action="store_true", help="also for training")
    options = parser.parse_args()
    destination: Path = options.destination
    if destination.exists():
        parser.error(f"{destination}: exists already")
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Written next to the destination and renamed, so that a data set is never half written.
    beside = temporary_folder(prefix=f".{destination.name}-", dir=destination.parent)
    with beside as unfinished, temporary_folder() as folder:
        given = {vendor: getattr(options, vendor) for vendor in VENDORS}
        packages = {
            vendor: package or download(vendor, folder) for vendor, package in given.items()
        }
        counts = prepare(packages, unfinished / "data", skin_tones=options.skin_tones)
        (unfinished / "data").rename(destination)
    print(f"{destination}: {', '.join(f'{n:,} {split}' for split, n in counts.items())} images")


if __name__ == "__main__":
    exit_at_once()
    main()
