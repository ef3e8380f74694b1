"""Opens weights without reading their arrays: how to read them, and what belongs to the model."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from vmoe import zoo
from vmoe.checkpoints import (
    chunked,
    export,
    folder,
    hugging_face,
    released,
    safetensors,
    timm,
    vit_npz,
)
from vmoe.checkpoints.assemble import Conversion
from vmoe.checkpoints.stored import Details, Format
from vmoe.class_names import class_names
from vmoe.config import ViTConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.train import Loss
from vmoe.errors import Failure, UsageError, VmoeError, parse_json
from vmoe.retry import retried

IMAGES = "preprocessor_config.json"
IMAGENET = {1000: "imagenet_1k", 21_843: "imagenet_21k"}  # by number of classes
WRONG = (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, RecursionError)
PRE_TRAINED = 224  # pixels; models of other sizes were fine-tuned


class Opened(NamedTuple):
    """Weights whose arrays are not read yet.

    Attributes:
        format: of the files.
        conversion: how their arrays become a model.
        details: what belongs to the model, given its config.
    """

    format: Format
    conversion: Conversion
    details: Callable[[ViTConfig], Details]


def is_published(path: Path) -> bool:
    """Whether the path is the prefix of a published checkpoint, or its index."""
    return chunked.exists(_prefix(path))


def open_published(path: Path) -> Opened:
    """Opens a checkpoint of the V-MoE authors.

    Raises:
        Failure: a file is missing, or the index is corrupt.
    """
    prefix = _prefix(path)
    entry = zoo.published(prefix.name)
    if entry is None:
        return Opened("published", released.conversion(prefix, released.ASSUMED), _google_details)
    moe = next(iter(entry.config.moe_blocks.values()))
    details = functools.partial(
        _google_details, capacity_source=entry.capacity_source, loss=entry.loss
    )
    return Opened("published", released.conversion(prefix, moe), details)


def open_npz(path: Path) -> Opened:
    """Opens a ViT of Google's in a .npz file.

    Raises:
        UsageError: the file holds Python objects.
        Failure: the file is corrupt.
    """
    return Opened("npz", vit_npz.conversion(path), _google_details)


def _prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".index" else path


def _google_details(
    config: ViTConfig,
    capacity_source: str = "that of the authors' pre-training",
    loss: Loss = "softmax",
) -> Details:
    """Class names and preprocessing, which these files do not have."""
    assumed = []
    if moe := next((each for each in config.moe_blocks.values() if each.router.can_drop), None):
        assumed += [
            f"k={moe.router.experts_per_token}, priority=order, images_per_group="
            f"{moe.images_per_group}, transfer_dtype={moe.transfer_dtype}",
            f"capacity_factor={moe.capacity_factor}, {capacity_source}",
        ]
    if config.positions != "learned":
        assumed.append(f"positions={config.positions}, image_size={config.image_size}")
    names, known = _names((), config.num_classes)
    preprocessing = google_preprocessing(config.image_size)
    return Details(names, preprocessing, (*assumed, *known, _text(preprocessing)), loss=loss)


def google_preprocessing(image_size: int) -> Preprocessing:
    """How the V-MoE authors evaluate models of an image size, with TensorFlow, which ignores EXIF.

    Pre-trained models, of 224 px: the shorter side is resized to 256 px by area averaging, then the
    centre is cropped. Fine-tuned ones: the image is resized bilinearly.
    """
    if image_size == PRE_TRAINED:
        return Preprocessing(224, 256, keep_aspect=True, interpolation="tf_area", exif=False)
    return Preprocessing(image_size, interpolation="tf_bilinear", exif=False)


def safetensors_file(path: Path) -> Path | None:
    """The .safetensors file, or the index of several, that a path names; None if there is none."""
    if path.is_file() and path.name.endswith((".safetensors", safetensors.INDEX)):
        return path
    for name in (folder.MODEL, folder.MODEL + safetensors.INDEX):
        if (path / name).is_file():
            return path / name
    return None


def open_safetensors(path: Path) -> Opened:
    """Opens a model of ours, timm's or Hugging Face's: .safetensors files beside config.json.

    Raises:
        UsageError: config.json is missing, or names another kind of model.
        Failure: a file is corrupt.
    """
    file = safetensors_file(path)
    assert file is not None
    place = file.with_name(folder.CONFIG)
    config = _json(place)
    if not config:
        raise UsageError(
            f"{file}: there is no config.json beside it, so the number of attention heads and the "
            "activation are unknown; put the model's config.json there"
        )
    if config.get("format") == export.FORMAT:
        raise UsageError(
            f"{file.parent}: a program of jax.export, see its README.md; give the checkpoint "
            "that it was exported from"
        )
    arrays = safetensors.read(file)
    with _corrupt_if_wrong(place):
        if config.get("format") == "vmoe":
            conversion = folder.conversion(arrays, config)
            return Opened("vmoe", conversion, lambda _: folder.details(place, config))
        if "architecture" in config:
            conversion = timm.conversion(arrays, config)
            return Opened("timm", conversion, functools.partial(_timm_details, place, config))
        if "model_type" in config:
            images = _json(file.with_name(IMAGES))
            conversion = hugging_face.conversion(arrays, config, images)
            details = functools.partial(_hf_details, place, config, images)
            return Opened("hugging_face", conversion, details)
    raise UsageError(
        f"{place}: it has neither architecture (timm), nor model_type (Hugging Face), nor format "
        "(vmoe)"
    )


@contextlib.contextmanager
def _corrupt_if_wrong(place: Path) -> Iterator[None]:
    """Turns errors about unexpected content into a Failure that names the file."""
    try:
        yield
    except VmoeError:
        raise
    except WRONG as error:
        raise Failure(f"{place}: corrupt ({error})") from None


def _timm_details(place: Path, config: dict[str, Any], model: ViTConfig) -> Details:
    with _corrupt_if_wrong(place):
        names, assumed = _names(timm.class_names(config), model.num_classes)
        if not {"mean", "std"} <= (config.get("pretrained_cfg") or {}).keys():
            assumed.append("pixels normalised by mean 0.5 and std 0.5")
        return Details(names, timm.preprocessing(config, model.image_size), tuple(assumed))


def _hf_details(
    place: Path, config: dict[str, Any], images: dict[str, Any], model: ViTConfig
) -> Details:
    with _corrupt_if_wrong(place.with_name(IMAGES)):
        preprocessing = hugging_face.preprocessing(images, model.image_size)
    with _corrupt_if_wrong(place):
        names, assumed = _names(hugging_face.class_names(config), model.num_classes)
    if not images:
        mean, std = hugging_face.normalisation(config["model_type"], images)
        assumed += [_text(preprocessing), f"pixels normalised by mean {mean} and std {std}"]
    if preprocessing.image_size != model.image_size:
        assumed.append(
            f"positions of {model.image_size} px resampled linearly to {preprocessing.image_size} "
            "px (transformers: bicubically)"
        )
    return Details(names, preprocessing, tuple(assumed))


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is no such file."""
    try:
        content = parse_json(retried(path, path.read_bytes))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise Failure(f"{path}: corrupt ({error})") from None
    if not isinstance(content, dict):
        raise Failure(f"{path}: corrupt (no JSON object)")
    return content


def _names(names: tuple[str, ...], classes: int) -> tuple[tuple[str, ...], list[str]]:
    """The class names, and what is assumed about them."""
    if not classes:
        return (), ["no classes, since no array is a head"]
    if len(names) == classes and len(set(names)) == classes:
        return names, []
    if classes in IMAGENET:
        return class_names(IMAGENET[classes]), [f"class names of {IMAGENET[classes]}"]
    if len(names) == classes:  # some are equal
        return tuple(f"{name} ({i})" for i, name in enumerate(names)), ["numbers in class names"]
    return tuple(map(str, range(classes))), ["class names 0, 1, ..."]


def _text(preprocessing: Preprocessing) -> str:
    crop = preprocessing.image_size
    side = preprocessing.resize_to or crop
    what = (
        f"with the shorter side to {side}" if preprocessing.keep_aspect else f"to {side} x {side}"
    )
    cropped = f", {crop} px cropped" if side != crop else ""
    stored = "" if preprocessing.exif else ", their EXIF orientation ignored"
    return f"images resized by {preprocessing.interpolation} {what} px{cropped}{stored}"
