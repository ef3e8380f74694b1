"""Image files of many kinds are decoded to RGB pixels; corrupt ones are an error."""

import io
import os
import struct
import subprocess
import sys
import zlib
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import EpsImagePlugin, Image, TiffImagePlugin, TiffTags

from vmoe.data.check import unreadable
from vmoe.data.decode import decode, read_image
from vmoe.data.fast_decode import decode_crop_and_resize
from vmoe.data.files import image_files_below
from vmoe.data.random_crop import Box
from vmoe.errors import UsageError


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", "png"), ("RGBA", "png"), ("P", "png"), ("CMYK", "jpg"), ("I;16", "png"), ("1", "png")],
)
def test_image_files_of_every_mode_decode_to_the_same_rgb(mode: str, suffix: str, tmp_path) -> None:
    gray = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
    if mode == "1":
        gray = np.where(gray > 127, 255, 0).astype(np.uint8)
    if mode == "I;16":
        image = Image.fromarray(gray.astype(np.uint16) * 257)
    else:
        image = Image.fromarray(gray).convert("RGB")
        image = image.quantize(256) if mode == "P" else image.convert(mode)
    image.save(tmp_path / f"image.{suffix}", **({"quality": 100} if suffix == "jpg" else {}))
    pixels = read_image(tmp_path / f"image.{suffix}")
    assert pixels.shape == (16, 16, 3) and pixels.dtype == np.uint8
    error = np.abs(pixels.astype(int) - gray[..., None]).max()
    assert error <= {"P": 4, "CMYK": 4}.get(mode, 0), error  # lossy: quantized, or a JPEG


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "RGB"])
def test_transparent_pixels_are_white_whatever_color_lies_below(mode: str, tmp_path) -> None:
    image = Image.new("RGBA", (4, 4), (10, 10, 10, 255))
    image.putpixel((1, 2), (200, 200, 200, 0))
    if mode in ("P", "RGB"):  # one color is transparent
        image = Image.new(mode, (4, 4), 0)
        image.putpixel((1, 2), 1 if mode == "P" else (200, 200, 200))
        image.info["transparency"] = 1 if mode == "P" else (200, 200, 200)
        if mode == "P":
            image.putpalette([10, 10, 10, 200, 200, 200])
    elif mode != "PA":
        image = image.convert(mode)
    image.save(tmp_path / "image.png")
    pixels = read_image(tmp_path / "image.png")
    assert (pixels[2, 1] == 255).all()
    assert (np.delete(pixels.reshape(16, 3), 9, axis=0) <= 10).all()


def test_half_transparent_pixels_are_blended_with_white(tmp_path) -> None:
    Image.new("RGBA", (1, 1), (100, 0, 200, 128)).save(tmp_path / "image.png")
    share = 128 / 255
    expected = np.array([100, 0, 200]) * share + 255 * (1 - share)
    np.testing.assert_allclose(read_image(tmp_path / "image.png")[0, 0], expected, atol=1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 70000, np.int32), r"32-bit integers \(mode I\); save it with 8 bits"),
        (np.full((4, 4), 0.5, np.float32), r"floats \(mode F\); save it with 8 bits"),
        (np.full((4, 4), 4095, np.uint16), "its 16-bit values end at 4095, so white is not 65,535"),
    ],
)
def test_images_whose_values_have_no_defined_range_are_refused_by_name(
    values: np.ndarray, message: str, tmp_path
) -> None:
    Image.fromarray(values).save(tmp_path / "image.tif")
    with pytest.raises(UsageError, match=f"image.tif: {message}"):
        read_image(tmp_path / "image.tif")


@pytest.mark.parametrize("suffix", ["tif", "png"])
@pytest.mark.parametrize("channels", [3, 4])
def test_colors_of_12_bits_in_16_are_refused_and_16_bits_become_8(
    suffix: str, channels: int, tmp_path
) -> None:
    """Microscopes and cameras write such TIFF files: they would be nearly black."""
    values = np.random.default_rng(0).integers(0, 4096, (8, 8, channels)).astype(np.uint16)
    path = tmp_path / f"image.{suffix}"
    cv2.imwrite(str(path), values)
    with pytest.raises(UsageError, match=f"{path}: its 16-bit values use less than 13 bits"):
        read_image(path)
    values = values[..., :3] * 16
    cv2.imwrite(str(path), values)
    np.testing.assert_allclose(read_image(path)[..., ::-1], values / 257, atol=1)


def tiff(values: np.ndarray, **tags: Any) -> bytes:
    """A TIFF file of 16 x 16 pixels whose strips are the first axis of the values."""
    file, directory = io.BytesIO(), TiffImagePlugin.ImageFileDirectory_v2()
    sizes = tuple(strip.nbytes for strip in values)
    offsets = tuple(i * size for i, size in enumerate(sizes))  # from the end of the tags
    named = {TiffTags.lookup(tag).name: tag for tag in TiffTags.TAGS_V2}
    directory.update({256: 16, 257: 16, 258: 8 * values.itemsize, 273: offsets, 278: 16})
    directory.update({279: sizes, **{named[name]: value for name, value in tags.items()}})
    directory.save(file)
    return file.getvalue() + values.tobytes()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_a_tiff_in_which_0_is_white_is_no_negative(dtype: type, tmp_path) -> None:
    values = np.linspace(0, np.iinfo(dtype).max, 256).astype(dtype).reshape(1, 16, 16)
    (tmp_path / "scan.tif").write_bytes(tiff(values, PhotometricInterpretation=0))
    pixels = read_image(tmp_path / "scan.tif")
    np.testing.assert_allclose(pixels[..., 0], 255 - np.arange(256).reshape(16, 16), atol=1)


def test_layouts_of_a_tiff_that_pillow_reads_wrongly_are_refused_by_name() -> None:
    colors = dict(PhotometricInterpretation=2, SamplesPerPixel=3, PlanarConfiguration=2)
    values = np.arange(256, dtype=np.uint8).reshape(1, 16, 16).repeat(3, axis=0)
    planes = tiff(values, BitsPerSample=(8,) * 3, **colors)
    np.testing.assert_array_equal(decode(planes, "a.tif"), values.transpose(1, 2, 0))
    planes = tiff(values.astype(np.uint16) * 257, BitsPerSample=(16,) * 3, **colors)
    with pytest.raises(UsageError, match="a.tif: its channels of 16 bits are stored one after ano"):
        decode(planes, "a.tif")
    signed = tiff(values[:1].view(np.int8), PhotometricInterpretation=1, SampleFormat=2)
    with pytest.raises(UsageError, match="a.tif: its values are signed; save it with 8 bits per"):
        decode(signed, "a.tif")


def bomb(kind: str) -> bytes:
    """A small file whose header declares 13,000 x 13,000 pixels."""
    file, sides = io.BytesIO(), struct.pack("<HH", 13000, 13000)
    if kind == "gif":
        screen = b"GIF89a" + sides + b"\x80\0\0" + bytes(6)
        return screen + b"," + bytes(4) + sides + b"\0\2\2\x4c\1\0;"
    Image.new("L", (8, 8)).save(file, kind)
    content = bytearray(file.getvalue())
    if kind == "png":
        content[16:24] = struct.pack(">II", 13000, 13000)
        content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    else:
        start = content.index(b"\xff\xc0") + 5
        content[start : start + 4] = struct.pack(">HH", 13000, 13000)
    return bytes(content)


@pytest.mark.parametrize("kind", ["gif", "png", "jpeg"])
def test_a_small_file_that_declares_many_pixels_is_refused_by_name(kind: str) -> None:
    """Of 89 to 179 million pixels Pillow warns, without a name, and decodes them."""
    for read in (
        lambda: decode(bomb(kind), "a.gif"),
        lambda: decode_crop_and_resize(bomb(kind), "a.gif", lambda h, w: Box(0, 0, h, w), 8),
    ):
        with pytest.raises(
            UsageError, match="a.gif: 13,000 x 13,000 pixels are more than data.max"
        ):
            read()


def test_a_frame_that_is_larger_than_its_screen_is_refused_by_name() -> None:
    screen = b"GIF89a" + struct.pack("<HH", 8, 8) + b"\x80\0\0" + bytes(6)
    frame = b"," + bytes(4) + b"\xff\xff\xff\xff\0\2\2\x4c\1\0;"
    with pytest.raises(UsageError, match="a.gif: a part has more pixels than data.max_pixels="):
        decode(screen + frame, "a.gif")


def test_the_odd_files_of_imagenet_decode_to_rgb(tmp_path) -> None:
    """One is a PNG named .JPEG; others are CMYK, whose values Adobe's programs invert."""
    gray = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
    image = Image.fromarray(gray).convert("RGB")
    image.save(tmp_path / "png.JPEG", "PNG")
    image.convert("CMYK").save(tmp_path / "cmyk.JPEG", "JPEG", quality=100)
    assert b"Adobe" in (tmp_path / "cmyk.JPEG").read_bytes()
    for name, tolerance in (("png.JPEG", 0), ("cmyk.JPEG", 4)):
        pixels = decode((tmp_path / name).read_bytes(), name)
        assert np.abs(pixels.astype(int) - gray[..., None]).max() <= tolerance, name


def test_a_photo_is_rotated_by_its_exif_orientation_or_left_as_stored(tmp_path) -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    pixels[0] = 200  # the top row of the file, the right column of the photo
    exif = Image.Exif()
    exif[0x0112] = 6  # show it rotated by 90 degrees clockwise
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "photo.png"), np.rot90(pixels, -1))
    stored = decode((tmp_path / "photo.png").read_bytes(), "photo.png", exif=False)
    np.testing.assert_array_equal(stored, pixels)


def test_files_that_are_not_complete_images_are_refused_by_name(tmp_path) -> None:
    rng = np.random.default_rng(0)
    complete = tmp_path / "whole.png"
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(complete)
    (tmp_path / "half.png").write_bytes(complete.read_bytes()[:2000])
    (tmp_path / "no.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in [
        ("half.png", "cannot be read as an image"),
        ("no.png", "not an image"),
        ("empty.png", "not an image"),
        ("gone.png", "no such file"),
        ("pipe.png", r"cannot be read \(not a regular file\)"),  # whose reading would wait
    ]:
        with pytest.raises(UsageError, match=rf"{name}: {message}"):
            read_image(tmp_path / name)


def test_postscript_in_a_file_of_another_name_never_reaches_ghostscript(
    tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/called\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # so it is looked for
    (tmp_path / "photos").mkdir()
    path = tmp_path / "photos" / "cat.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n%%EOF\n")
    with pytest.raises(UsageError, match="cat.jpg: not an image, or in a format"):
        read_image(path)
    found, _, _ = image_files_below(tmp_path / "photos")
    record = tmp_path / "record"
    assert unreadable(tmp_path, found.__getitem__, len(found), record).keys() == {0}
    assert not (tmp_path / "called").exists()


def test_decoding_bytes_equals_reading_the_file_and_pixels_are_unchanged(tmp_path) -> None:
    path = tmp_path / "image.jpg"
    Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)).save(path)
    pixels = decode(path.read_bytes(), "somewhere")
    np.testing.assert_array_equal(pixels, read_image(path))
    assert decode(pixels, "somewhere") is pixels
    with pytest.raises(UsageError, match="somewhere: cannot be read as an image"):
        decode(path.read_bytes()[:-100], "somewhere")


@pytest.mark.process
def test_all_formats_are_loaded_before_a_thread_decodes_an_image() -> None:
    """Two threads that load them at once can fail to identify an image."""
    code = """
import vmoe.data.decode
from PIL import Image
before = set(Image.OPEN)
Image.init()
assert "TIFF" in before and set(Image.OPEN) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
