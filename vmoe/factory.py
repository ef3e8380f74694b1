"""Models by name and from files: ``create_model``, ``list_models``, ``load``, ``save``."""

import dataclasses
import fnmatch
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, UInt8

from vmoe import models, zoo
from vmoe.checkpoints import Origin, StoredModel, read, write
from vmoe.checkpoints.assemble import check_shapes
from vmoe.checkpoints.restore import split_path
from vmoe.config import RoutingOverrides, TrainConfig, ViTConfig, replace
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.routing_file import RoutingFile
from vmoe.config.train import Loss
from vmoe.data.crops import resize_and_crop
from vmoe.data.decode import decode, read_image
from vmoe.errors import UsageError, listed, naming, require
from vmoe.fields import NOT_EMPTY
from vmoe.host import forks
from vmoe.mesh import place
from vmoe.nn.inputs import to_float
from vmoe.nn.vit import ViT
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.surgery import fit
from vmoe.surgery.resize import FIXED, PARTS
from vmoe.trees import by_name
from vmoe.workdir.routing_file import OLDER_NAME, ROUTING_FILE, read_routing_file

SIZES = ("num_classes", "pre_logits", "image_size")
__all__ = ["Loaded", "Origin", "create_model", "list_models", "load", "save"]

Image = str | Path | bytes | np.ndarray  # a file, its content, or its pixels: uint8[h w 3]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A trained model with everything that is needed to use it."""

    model: ViT
    class_names: tuple[str, ...]
    """Names of the classes, in the order of the logits."""
    preprocessing: Preprocessing
    """Resizing, cropping and scaling of images for the model."""
    step: int | None
    """Number of training steps; None if unknown."""
    origin: Origin
    train_config: TrainConfig | None = None
    """Config of the training run; None if the checkpoint does not come from a run."""
    routing_file: tuple[Path, RoutingFile] | None = None
    """Path and content of the routing.json that the model uses; None if it uses none."""

    loss: Loss = "softmax"
    """The loss that the model was trained with."""

    @property
    def sigmoid(self) -> bool:
        """Whether it was trained with the sigmoid loss, binary cross-entropy per class."""
        return self.loss == "sigmoid"

    @property
    def counted_config(self) -> ViTConfig:
        """The model's config for counts, with the size of the images of ``preprocessing``.

        They may be larger or smaller than those that the model was trained with.
        """
        return replace(self.model.config, image_size=self.preprocessing.image_size)

    def preprocess(self, images: Iterable[Image]) -> Float[np.ndarray, "b h w 3"]:
        """Images resized, cropped and scaled for the model, float32 in [-1, 1].

        Args:
            images: paths or bytes of image files, or pixels uint8[h w 3] in [0, 255], of any size;
                or one array uint8[b h w 3].

        Raises:
            UsageError: there are no images, or one is neither an image file nor a pixel array.
        """
        if isinstance(images, str | Path):
            raise UsageError("give a list of images", images=images)
        pixels = [
            resize_and_crop(_pixels(image, i, self.preprocessing), self.preprocessing)
            for i, image in enumerate(images)
        ]
        NOT_EMPTY.check(images=pixels)
        return to_float(np.stack(pixels))

    def save(self, path: str | Path) -> None:
        """Writes the current model to a folder that ``load`` and training can open.

        The folder also has the class names, the preprocessing and a model card. For other formats
        see ``vmoe.checkpoints.write``.

        Args:
            path: a new or an empty folder, or the hub repository hf://OWNER/NAME to push to.

        Raises:
            UsageError: the folder has files, or a layer of the model was replaced by one that its
                config does not describe.
            Failure: it cannot be written.
        """
        models.check_described(self.model)
        stored = StoredModel(
            config=self.model.config,
            params=models.params_of(self.model),
            class_names=self.class_names,
            preprocessing=self.preprocessing,
            step=self.step,
            origin=self.origin,
            train_config=self.train_config,
            loss=self.loss,
        )
        write(stored, path, format="vmoe")


def _pixels(image: Image, i: int, how: Preprocessing) -> UInt8[np.ndarray, "h w 3"]:
    if isinstance(image, str | Path):
        return read_image(image, exif=how.exif, max_pixels=how.max_pixels)
    if isinstance(image, bytes):
        return decode(image, f"images[{i}]", exif=how.exif, max_pixels=how.max_pixels)
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[-1] != 3:
        raise UsageError(
            f"images[{i}] is {array.dtype}{list(array.shape)}: give a path, or RGB pixels "
            "uint8[h w 3], such as a PIL image after convert('RGB')"
        )
    return array


def create_model(
    name: str, *, pretrained: bool | str | Path = False, seed: int = 0, **overrides: Any
) -> ViT:
    """Creates a model by name, newly initialized or with trained parameters.

    Args:
        name: one of ``list_models()``; with ``pretrained=True`` also with a tag, as in
            ``list_models(pretrained=True)``.
        pretrained: True for the weights of that name; or a path, as for ``load``. The model then
            takes from the weights the number of classes, pre-logits, image size, resampling of
            positions, parts such as registers, and the fields that training depends on, such as the
            activation (``SIZES``, ``PARTS``, ``FIXED``). Positions are resampled for another
            ``image_size``; the head is new for another ``num_classes`` or ``pre_logits``. New and
            resampled parameters are reported on stderr.
        seed: seed of the new parameters.
        overrides: fields of ViTConfig; a dict changes fields of a nested config.

    Raises:
        UsageError: no such model, field or weights, or the weights do not fit the model.
        Failure: the weights are corrupt.
    """
    forks.computes()
    model, _, tag = name.partition(".")
    if tag and model in models.MODELS and pretrained is not True:
        raise UsageError(f"{name}: a tag names trained weights; use pretrained=True, or {model!r}")
    if not pretrained:
        return models.create_model(name, seed=seed, **overrides)
    entry = zoo.find(name) if pretrained is True else None
    if pretrained is True and entry is None:
        raise models.unknown_model(name, list_models(pretrained=True))
    stored = read(entry.path if entry else str(pretrained))
    trained = stored.config
    if entry:
        config = replace(trained, **overrides)
    else:
        fields = (*FIXED, *SIZES, *PARTS, "position_resampling")
        given = {field: getattr(trained, field) for field in fields}
        config = models.model_config(name, **given | overrides)
    params, changes = fit(trained, stored.params, config, seed=seed)
    del stored  # else its arrays would be held twice
    for what, paths in (("new", changes.new), ("resized", changes.resized)):
        if paths:
            print(f"{name}: {len(paths)} parameters {what}: {listed(paths, 5)}", file=sys.stderr)
    return models.with_params(config, _to_device(params, ONE_DEVICE.params(params)))


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """The names of models that match a pattern with wildcards, sorted.

    Args:
        pretrained: list the names of trained weights instead, MODEL.TAG.

    >>> list_models("vmoe_b16*", pretrained=True)
    ['vmoe_b16_every2_e8.in21k_strong', 'vmoe_b16_every2_e8.in21k_strong_ft_in1k_384']
    """
    if not pretrained:
        return models.list_models(pattern)
    return sorted(fnmatch.filter([entry.name for entry in zoo.ENTRIES], pattern))


def _to_device(params: dict[Any, Any], shardings: Mapping[Any, Any]) -> dict[Any, Any]:
    """Moves arrays from the host to the devices, one by one, so that few are held twice.

    Empties ``params``. ``jnp.asarray`` would compile a program for every shape.
    """
    return {
        key: _to_device(value, shardings[key])
        if isinstance(value, dict)
        else jax.device_put(value, shardings[key]).block_until_ready()
        for key, value in ((key, params.pop(key)) for key in list(params))
    }


def placement_of(config: ViTConfig, mesh: str | None, fsdp: bool) -> Placement:
    """Where ``load`` puts a model of this config, with the same arguments."""
    if mesh is None and not fsdp:
        return ONE_DEVICE
    return place(config, jax.local_devices(), mesh=mesh or "", fsdp=fsdp)


def load(
    path: str | Path,
    *,
    routing: RoutingOverrides | None = None,
    model: Mapping[str, Any] | None = None,
    use_ema: bool = True,
    routing_file: bool | str | Path = False,
    mesh: str | None = None,
    fsdp: bool = False,
) -> Loaded:
    """Loads a trained model from files; see also ``vmoe.checkpoints.read``.

    Corrupt checkpoints of a run, and settings that files do not specify, are reported on stderr.

    Args:
        path: a run folder, or ``checkpoints/STEP``, ``checkpoints/best`` or ``checkpoints/last``
            in one; a folder of weights from vmoe, timm or Hugging Face; a .npz file of a ViT;
            the prefix of a published V-MoE checkpoint; the URL of one of
            these, such as gs://BUCKET/PREFIX or hf://OWNER/NAME, whose files are downloaded once;
            or a name from ``list_models(pretrained=True)``, unless there is a file or folder of
            that name.
        routing: routing settings that replace the trained ones, such as the capacity factor.
        model: fields that replace fields of the stored model config, such as
            ``{"positions": "none", "moe": {"router": ExpertChoice()}}``.
        use_ema: load the moving average of the parameters, if the run has one.
        routing_file: True for the routing.json in the run folder, if there is one; or the path of
            a file that ``vmoe capacity`` wrote. It cannot be combined with ``routing``.
        mesh: the devices of the model: None for one; such as "data=2,expert=4" for all of this
            process, as for ``vmoe train --mesh``; "" for all in a mesh that suits the model.
        fsdp: also shard large dense parameters over the axis "data" of all devices.

    Raises:
        UsageError: there is no trained model at the path, one that cannot be represented, or an
            override has no effect on it; or the routing file is missing, corrupt or made
            for a model with other MoE layers; or the model cannot be split over the mesh.
        Failure: the files, or all checkpoints at the path, are corrupt.
    """
    forks.computes()
    if routing_file and routing not in (None, RoutingOverrides()):
        raise UsageError("give this or routing settings", routing_file=routing_file)
    stored = read(path, use_ema=use_ema)
    config = (routing or RoutingOverrides()).apply(replace(stored.config, **model or {}))
    chosen = _chosen_routing(routing_file, stored.origin)
    if chosen:
        with naming(chosen[0]):
            config = chosen[1].apply(config)
    if model:
        check_shapes({name: leaf.shape for name, leaf in by_name(stored.params).items()}, config)
    placement = placement_of(config, mesh, fsdp)
    params = _to_device(stored.params, placement.params(stored.params))
    return Loaded(
        model=models.with_params(config, params, placement=placement),
        class_names=stored.class_names,
        preprocessing=stored.preprocessing,
        step=stored.step,
        origin=stored.origin,
        train_config=stored.train_config,
        routing_file=chosen,
        loss=stored.loss,
    )


def save(
    model: ViT,
    path: str | Path,
    *,
    class_names: Sequence[str],
    preprocessing: Preprocessing | None = None,
    step: int | None = None,
    loss: Loss = "softmax",
) -> None:
    """Writes a model to a folder that ``load``, every command and training open.

    For a model from ``load`` use its method ``save``, which keeps its classes and preprocessing.

    Args:
        model: the model to write.
        path: a new or an empty folder, or hf://OWNER/NAME, to which it is pushed.
        class_names: the name of each logit, in their order.
        preprocessing: how images are prepared for the model; if None, they are resized to its
            image size.
        step: number of training steps; None if unknown.
        loss: the loss of its training, which decides how logits become probabilities.

    Raises:
        UsageError: the folder has files, the names are not as many as the logits, or a layer was
            replaced by one that the model's config does not describe.
        Failure: it cannot be written.
    """
    names, logits = tuple(class_names), model.config.num_classes
    require(len(names) == logits, f"give the {logits} names of the logits", class_names=len(names))
    Loaded(
        model=model,
        class_names=names,
        preprocessing=preprocessing or Preprocessing(model.config.image_size),
        step=step,
        origin=Origin("vmoe", path),
        loss=loss,
    ).save(path)


def _chosen_routing(given: bool | str | Path, origin: Origin) -> tuple[Path, RoutingFile] | None:
    """Path and content of the given routing file, or of the one in the run folder."""
    if not isinstance(given, bool):
        path = Path(given).expanduser()
        return path, read_routing_file(path)
    file = routing_file_of(origin)
    files = () if file is None or not given else (file, file.with_name(OLDER_NAME))
    return next(((path, read_routing_file(path)) for path in files if path.exists()), None)


def routing_file_of(origin: Origin) -> Path | None:
    """The path of a run's routing.json; None if the model does not come from a run."""
    if origin.format != "run":
        return None
    return split_path(Path(origin.path))[0] / ROUTING_FILE
