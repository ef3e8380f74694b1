"""Image files of many kinds become RGB pixels, and broken ones are refused."""

import numpy as np
import pytest
from PIL import Image

from vmoe.data.decode import decode, read_image
from vmoe.errors import UsageError


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("1", "png")],
)
def test_image_files_of_every_mode_decode_to_the_same_rgb(mode: str, suffix: str, tmp_path) -> None:
    grey = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
    if mode == "1":
        grey = np.where(grey > 127, 255, 0).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(grey.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(grey).convert("RGB")
        image = image.quantize(256) if mode == "P" else image.convert(mode)
    image.save(tmp_path / f"image.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    found = read_image(tmp_path / f"image.{suffix}")
    assert found.shape == (16, 16, 3) and found.dtype == np.uint8
    off = np.abs(found.astype(int) - grey[..., None]).max()
    assert off <= {"P": 4, "CMYK": 4}.get(mode, 0), off  # lossy: quantised, or a JPEG


def test_a_photo_is_turned_upright_as_its_exif_says(tmp_path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 200  # the top row of the file, the right column of the photo
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), np.rot90(pixels, -1))


def test_what_is_not_a_whole_image_is_refused_by_name(tmp_path) -> None:
    rng = np.random.default_rng(0)
    whole = tmp_path / "whole.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "half.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "no.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    for name, message in [
        ("half.png", "cannot be read as an image"),
        ("no.png", "not an image"),
        ("empty.png", "not an image"),
        ("gone.png", "no such file"),
    ]:
        with pytest.raises(UsageError, match=rf"{name}: {message}"):
            read_image(tmp_path / name)


def test_decoding_bytes_is_reading_the_file_and_pixels_pass_unchanged(tmp_path) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path)
    pixels = decode(path.read_bytes(), "somewhere")
    np.testing.assert_array_equal(pixels, read_image(path))
    assert decode(pixels, "somewhere") is pixels
    with pytest.raises(UsageError, match="somewhere: cannot be read as an image"):
        decode(path.read_bytes()[:-100], "somewhere")
