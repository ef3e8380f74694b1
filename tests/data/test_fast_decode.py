"""The fast mode sees the same images as the exact mode, up to rounding and reduced decoding."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from vmoe.data.decode import decode
from vmoe.data.fast_decode import JPEG, decode_crop_and_resize
from vmoe.data.random_crop import Box
from vmoe.data.resize import resize
from vmoe.errors import UsageError

ORIENTATION = 0x0112  # the EXIF tag


def photo(h: int = 96, w: int = 128) -> Image.Image:
    """Smooth colors, different at every edge."""
    noise = np.random.default_rng(0).integers(0, 256, (h // 16, w // 16, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((w, h), Image.Resampling.BICUBIC)


def encode(image: Image.Image, suffix: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, suffix, **options)
    return file.getvalue()


def whole(h: int, w: int) -> Box:
    return Box(0, 0, h, w)


def assert_close(found: np.ndarray, expected: np.ndarray, *, jpeg: bool) -> None:
    """Up to the rounding of the resizing; the colors of a JPEG are repeated, not interpolated."""
    assert found.shape == expected.shape and found.dtype == expected.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected)
    assert difference.max() <= (16 if jpeg else 1)
    assert difference.mean() <= (3 if jpeg else 0.5)


READ_FAST = {
    "JPEG": encode(photo(), "JPEG"),
    "progressive JPEG": encode(photo(), "JPEG", progressive=True),
    "JPEG without subsampling": encode(photo(), "JPEG", subsampling=0),
    "JPEG in RGB": encode(photo(), "JPEG", keep_rgb=True),
    "gray JPEG": encode(photo().convert("L"), "JPEG"),
    "two pictures": encode(photo(), "MPO", save_all=True, append_images=[photo()]),
    "PNG": encode(photo(), "PNG"),
    "gray PNG": encode(photo().convert("L"), "PNG"),
    "WebP": encode(photo(), "WEBP"),
    "BMP": encode(photo(), "BMP"),
}
PALETTE, TRANSPARENT = photo().quantize(16), photo().convert("RGBA")
TRANSPARENT.putalpha(100)
REFUSED = {
    "CMYK JPEG": encode(photo().convert("CMYK"), "JPEG"),
    "16 bits, gray": encode(Image.fromarray(np.full((96, 128), 257 * 90, np.uint16)), "PNG"),
    "16 bits": cv2.imencode(".png", np.full((96, 128, 3), 257 * 90, np.uint16))[1].tobytes(),
    "transparent PNG": encode(TRANSPARENT, "PNG"),
    "transparent WebP": encode(TRANSPARENT, "WEBP"),
    "palette": encode(PALETTE, "PNG"),
    "one transparent color": encode(photo(), "PNG", transparency=(0, 0, 0)),
    "GIF": encode(PALETTE, "GIF"),
    "TIFF": encode(photo(), "TIFF"),
}


@pytest.mark.parametrize("kind", READ_FAST | REFUSED)
def test_every_kind_of_image_is_close_to_pillows(kind: str) -> None:
    """Pillow decodes images that the fast libraries read differently; the result reports this."""
    image, box = (READ_FAST | REFUSED)[kind], Box(10, 20, 80, 70)
    found, refused = decode_crop_and_resize(image, kind, lambda h, w: box, 64)
    expected = resize(decode(image, kind)[box.slices], 64, 64, "tf_bilinear")
    assert_close(found, expected, jpeg=kind in READ_FAST and READ_FAST[kind][:2] == JPEG)
    assert refused == (kind in REFUSED)


@pytest.mark.parametrize(
    ("size", "scale"),
    [(128, 1), (96, 1), (50, 1), (48, 2), (25, 2), (24, 4), (13, 4), (12, 8), (3, 8)],
)
def test_a_jpeg_is_reduced_while_decoding_only_as_far_as_the_crop_allows(
    size: int, scale: int
) -> None:
    """The oracle is means over squares of 1, 2, 4 or 8 pixels, which differ in a noisy image."""
    noise = np.random.default_rng(0).integers(0, 256, (192, 256, 3), dtype=np.uint8)
    image = encode(Image.fromarray(noise), "JPEG", subsampling=0, quality=95)
    box = Box(16, 32, 96, 112)
    found, _ = decode_crop_and_resize(image, "noise", lambda h, w: box, size)
    pixels = decode(image, "noise")[box.slices].astype(float)
    errors = {}
    for side in (1, 2, 4, 8):
        means = pixels.reshape(96 // side, side, 112 // side, side, 3).mean((1, 3))
        expected = resize(means.round().astype(np.uint8), size, size, "tf_bilinear")
        errors[side] = np.abs(found - expected.astype(float)).mean()
    assert min(errors, key=lambda side: errors[side]) == scale and errors[scale] < 5


@pytest.mark.parametrize("exif", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("suffix", "size"), [("JPEG", 48), ("JPEG", 18), ("PNG", 18)])
def test_the_exif_orientation_is_applied_or_ignored_as_in_the_exact_mode(
    suffix: str, size: int, orientation: int, exif: bool
) -> None:
    """Also where a JPEG is decoded at a quarter of its size, for 18 pixels; a PNG is not."""
    tags, sides, box = Image.Exif(), [], Box(8, 0, 72, 88)
    tags[ORIENTATION] = orientation
    image = encode(photo(), suffix, exif=tags)
    if suffix == "JPEG":  # a segment in front that holds the marker with which the pixels begin
        image = image[:2] + b"\xff\xe2\0\6\xff\xda\0\0" + image[2:]
    found, refused = decode_crop_and_resize(
        image, "photo", lambda h, w: sides.append((h, w)) or box, size, exif=exif
    )
    assert sides == [(128, 96) if exif and orientation >= 5 else (96, 128)] and not refused
    pixels = decode(image, "photo", exif=exif)
    assert pixels.shape[:2] == sides[0]
    reduced = suffix == "JPEG" and size == 18
    expected = resize(pixels[box.slices], size, size, "bilinear" if reduced else "tf_bilinear")
    assert_close(found, expected, jpeg=suffix == "JPEG")


def test_pillow_decodes_no_png_that_opencv_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], PngImagePlugin.PngImageFile.load

    def counted(image: Image.Image) -> object:
        loads.append(image)
        return load(image)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", counted)
    _, refused = decode_crop_and_resize(READ_FAST["PNG"], "photo", whole, 32)
    assert not refused and not loads


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP", "BMP", "CMYK JPEG"])
def test_a_truncated_image_is_refused_as_in_the_exact_mode(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    image = (READ_FAST | REFUSED)[kind]
    for length in (0, 10, len(image) // 3, len(image) - 40):
        with pytest.raises(UsageError) as exact:
            decode(image[:length], "photo")
        with pytest.raises(UsageError) as fast:
            decode_crop_and_resize(image[:length], "photo", whole, 32)
        assert str(fast.value) == str(exact.value)
    assert capfd.readouterr().err == ""


def test_a_jpeg_that_claims_billions_of_pixels_is_refused_before_it_takes_memory() -> None:
    image = bytearray(READ_FAST["JPEG"])
    sides = image.index(b"\xff\xc0") + 5
    image[sides : sides + 4] = b"\xff\x00\xff\x00"
    with pytest.raises(
        UsageError,
        match="photo: 65,280 x 65,280 pixels are more than data.max_pixels=89478485; make",
    ):
        decode_crop_and_resize(bytes(image), "photo", whole, 32)


def test_pixels_are_cropped_and_resized_alike() -> None:
    pixels = np.asarray(photo())
    found, refused = decode_crop_and_resize(pixels, "array", lambda h, w: Box(1, 2, 60, 50), 40)
    expected = resize(pixels[Box(1, 2, 60, 50).slices], 40, 40, "tf_bilinear")
    assert_close(found, expected, jpeg=False)
    assert not refused


def test_opencv_starts_no_threads_of_its_own() -> None:
    decode_crop_and_resize(READ_FAST["JPEG"], "photo", whole, 32)
    assert cv2.getNumThreads() == 1
