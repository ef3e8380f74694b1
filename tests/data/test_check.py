"""The check of image files: complete and incomplete files, and how long the result is kept."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.config.data import ImageChecks
from vmoe.data import check
from vmoe.data.check import unreadable
from vmoe.data.files import image_files_below
from vmoe.data.sources import open_source
from vmoe.errors import UsageError

PIXELS = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)


def found(folder: Path, how: str = "headers") -> dict[str, str]:
    files, _, _ = image_files_below(folder)
    record = folder.parent / f"{abs(hash(tuple(files)))}.json"  # another one if a file changes
    return {
        Path(files[i].path).name: r
        for i, r in unreadable(
            folder, files.__getitem__, len(files), record, ImageChecks(how)
        ).items()
    }


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif"])
def test_truncated_files_are_found_and_bytes_after_the_end_are_allowed(
    suffix: str, tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    whole = folder / f"whole.{suffix}"
    Image.fromarray(PIXELS).save(whole)
    content = whole.read_bytes()
    (folder / f"cut.{suffix}").write_bytes(content[: len(content) // 2])
    (folder / f"head.{suffix}").write_bytes(content[:30])
    (folder / f"more.{suffix}").write_bytes(content + b"\1" * 9000)  # such as a video after a photo
    assert found(folder).keys() == {f"cut.{suffix}", f"head.{suffix}"}


def test_changed_bytes_are_found_by_decoding(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    path = folder / "image.png"
    Image.fromarray(PIXELS).save(path)
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    assert not found(folder)
    assert found(folder, "decode").keys() == {"image.png"}


def test_the_result_is_remembered_until_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(PIXELS).save(folder / name)
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:-30])
    first = found(folder)
    assert first.keys() == {"b.png"} and list(tmp_path.glob("*.json"))
    with monkeypatch.context() as patch:
        patch.setattr(check, "_reason", None)  # so reading a file would fail
        assert found(folder) == first
    Image.fromarray(PIXELS).save(folder / "b.png")
    assert not found(folder)


def test_a_file_that_is_added_to_a_folder_is_checked_alone(tmp_path: Path) -> None:
    """A file of the same size and time is not read again, so its new content is not noticed."""
    folder = tmp_path / "photos"
    for name in "ab":
        (folder / name).mkdir(parents=True)
        for i in range(20):
            Image.fromarray(PIXELS + i).save(folder / name / f"{i}.png")
    assert len(open_source(f"folder:{folder}", "train")) > 0
    kept, added = folder / "a" / "7.png", folder / "b" / "new.png"
    status, content = kept.stat(), kept.read_bytes()
    kept.write_bytes(content[:-16] + bytes(16))
    os.utime(kept, ns=(status.st_atime_ns, status.st_mtime_ns))
    added.write_bytes(content)
    open_source(f"folder:{folder}", "train")
    added.write_bytes(content[:-30])
    with pytest.raises(UsageError, match=r"1 of 41 images cannot be read: \S+/b/new.png"):
        open_source(f"folder:{folder}", "train")
    os.utime(kept)
    with pytest.raises(UsageError, match="2 of 41 images cannot be read"):
        open_source(f"folder:{folder}", "train")


def test_a_file_that_cannot_be_opened_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(PIXELS).save(folder / "a.png")
    files, _, _ = image_files_below(folder)
    (folder / "a.png").rename(folder / "away")
    record = tmp_path / "record.json"
    assert unreadable(folder, files.__getitem__, len(files), record) == {
        0: "No such file or directory"
    }
    (folder / "away").rename(folder / "a.png")
    assert not unreadable(folder, files.__getitem__, len(files), record)


def test_gray_images_of_12_bits_are_found_and_a_broken_exif_block_raises_no_error(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(folder / "gray.png")
    Image.fromarray(PIXELS).save(folder / "exif.jpg")
    content = (folder / "exif.jpg").read_bytes()
    exif = b"Exif\0\0MM\0*"
    block = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (folder / "exif.jpg").write_bytes(content[:2] + block + content[2:])
    assert "gray.png" in found(folder, "decode")
