"""Other people's weights as ``StoredModel``: the reader, the class names, the preprocessing."""

import json
from pathlib import Path
from typing import Any

from vmoe.checkpoints import chunked, folder, hugging_face, released, safetensors, timm, vit_npz
from vmoe.checkpoints.assemble import Assembled
from vmoe.checkpoints.stored import Format, Origin, StoredModel
from vmoe.class_names import class_names
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import Failure, UsageError

CONFIG, IMAGES = "config.json", "preprocessor_config.json"
IMAGENET = {1000: "imagenet_1k", 21_843: "imagenet_21k"}  # by number of classes
PRE_TRAINED = 224  # pixels; models of other sizes were fine-tuned


def is_published(path: Path) -> bool:
    """Whether the path is the prefix of a published checkpoint, or its index."""
    return chunked.exists(_prefix(path))


def read_published(path: Path) -> StoredModel:
    """Reads a checkpoint of the V-MoE authors.

    Raises:
        UsageError: it holds another kind of model.
        Failure: a file is missing or corrupt.
    """
    found = released.read(_prefix(path))
    routing = [
        f"{name}={value}"
        for name, value in (
            ("k", 2),
            ("priority", "order"),
            ("capacity_factor", f"{released.ASSUMED.capacity_factor} (the authors' in evaluation)"),
            ("images_per_group", released.ASSUMED.images_per_group),
            ("transfer_dtype", released.ASSUMED.transfer_dtype),
        )
    ]
    return _flax_model("published", path, found, routing if found.config.sparse_blocks else [])


def _prefix(path: Path) -> Path:
    return path.with_suffix("") if path.suffix == ".index" else path


def read_npz(path: Path) -> StoredModel:
    """Reads a ViT of Google's in a .npz file.

    Raises:
        UsageError: it holds another kind of model.
        Failure: the file is corrupt.
    """
    return _flax_model("npz", path, vit_npz.read(path), [])


def _flax_model(kind: Format, path: Path, found: Assembled, assumed: list[str]) -> StoredModel:
    """A model whose files tell neither class names nor preprocessing."""
    config = found.config
    if config.positions != "learned":
        assumed = [*assumed, f"positions={config.positions}, image_size={config.image_size}"]
    names, known = _names((), config.num_classes)
    preprocessing = preprocessing_of_authors(config.image_size)
    assumed = [*assumed, *known, f"preprocessing {_text(preprocessing)}"]
    origin = Origin(kind, path, assumed=tuple(assumed), dropped=found.dropped)
    return StoredModel(config, found.params, names, preprocessing, None, origin)


def preprocessing_of_authors(image_size: int) -> Preprocessing:
    """How the V-MoE authors evaluate models of an image size.

    Pre-trained models, of 224 px: the shorter side is resized to 256 px by area averaging, then the
    centre is cropped. Fine-tuned ones: the image is resized bilinearly.
    """
    if image_size == PRE_TRAINED:
        return Preprocessing(224, resize_to=256, keep_aspect=True, interpolation="tf_area")
    return Preprocessing(image_size, interpolation="tf_bilinear")


def safetensors_file(path: Path) -> Path | None:
    """The .safetensors file, or the index of several, that a path names; None if there is none."""
    if path.is_file() and path.name.endswith((".safetensors", safetensors.INDEX)):
        return path
    for name in (folder.MODEL, folder.MODEL + safetensors.INDEX):
        if (path / name).is_file():
            return path / name
    return None


def read_safetensors(path: Path) -> StoredModel:
    """Reads a model of ours, timm's or Hugging Face's: .safetensors files beside config.json.

    Raises:
        UsageError: config.json is missing, or names another kind of model.
        Failure: a file is corrupt.
    """
    file = safetensors_file(path)
    assert file is not None
    config = _json(file.with_name(CONFIG))
    if not config:
        raise UsageError(
            f"{file}: there is no config.json beside it, so the number of attention heads and the "
            "activation are unknown; put the model's config.json there"
        )
    arrays = safetensors.read(file)
    if config.get("format") == "vmoe":
        return folder.read(arrays, config)
    try:
        return _torch_model(path, config, _json(file.with_name(IMAGES)), arrays)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise Failure(f"{file.with_name(CONFIG)}: corrupt ({error})") from None


def _torch_model(path: Path, config: Any, images: Any, arrays: Any) -> StoredModel:
    if "architecture" in config:
        kind, found = "timm", timm.read(arrays, config)
        names = timm.class_names(config)
        preprocessing = timm.preprocessing(config, found.config.image_size)
    elif "model_type" in config:
        kind, found = "hugging_face", hugging_face.read(arrays, config, images)
        names = hugging_face.class_names(config)
        preprocessing = hugging_face.preprocessing(images, found.config.image_size)
    else:
        raise UsageError(
            f"{path}: config.json has neither architecture (timm), nor model_type (Hugging Face), "
            "nor format (vmoe)"
        )
    names, known = _names(names, found.config.num_classes)
    assumed = (
        known if images or kind == "timm" else [*known, f"preprocessing {_text(preprocessing)}"]
    )
    origin = Origin(kind, path, assumed=tuple(assumed), dropped=found.dropped)
    return StoredModel(found.config, found.params, names, preprocessing, None, origin)


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file; empty if there is no such file."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise Failure(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise Failure(f"{path}: corrupt ({error})") from None
    if not isinstance(content, dict):
        raise Failure(f"{path}: corrupt (no JSON object)")
    return content


def _names(names: tuple[str, ...], classes: int) -> tuple[tuple[str, ...], list[str]]:
    """The class names, and what is assumed about them."""
    if len(names) == classes and len(set(names)) == classes:
        return names, []
    if classes in IMAGENET:
        return class_names(IMAGENET[classes]), [f"class names of {IMAGENET[classes]}"]
    return tuple(map(str, range(classes))), ["class names 0, 1, ..."]


def _text(preprocessing: Preprocessing) -> str:
    crop = preprocessing.image_size
    side = preprocessing.resize_to or crop
    what = f"shorter side to {side} px" if preprocessing.keep_aspect else f"to {side} x {side} px"
    cropped = f", {crop} px cropped" if side != crop else ""
    return f"({preprocessing.interpolation} {what}{cropped})"
