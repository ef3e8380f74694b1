"""Recognizes the files at a path, and opens them without reading their arrays."""

from pathlib import Path
from typing import NamedTuple

from vmoe import models, zoo
from vmoe.checkpoints import (
    chunked,
    from_flax,
    from_hugging_face,
    from_siglino,
    from_timm,
    remote,
    safetensors_files,
    vmoe_format,
)
from vmoe.checkpoints.family import Family, corrupt_if_wrong, read_json
from vmoe.checkpoints.restore import find, is_run
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.errors import UsageError, choice
from vmoe.workdir.layout import read_class_names, read_config

PICKLES = (".pth", ".pt", ".bin", ".ckpt", ".pkl", ".pickle", ".tar")
FORMATS = (
    "a run folder (it has config.json), or its checkpoints/STEP, checkpoints/best or "
    "checkpoints/last; or a folder with model.safetensors and config.json (of vmoe, timm or "
    "Hugging Face); or a .npz file of a ViT; or the PREFIX of a "
    "published checkpoint, PREFIX.index; or a URL of one, such as hf://OWNER/NAME; or a "
    "name that `vmoe models` lists"
)

NAMES = [name for entry in zoo.ENTRIES for name in (entry.model, entry.name)]


def resolve(path: str | Path) -> tuple[Path, str | Path]:
    """Resolves a name or a URL to a local path; the files of a URL are downloaded.

    Returns:
        the local path, and the path or URL to show in messages.
    """
    resolved = zoo.resolve(str(path))
    if url := remote.url_of(resolved):
        _refuse_pickle(url)
        return remote.fetch(url), url
    return Path(resolved).expanduser(), path


class Run(NamedTuple):
    """A run, whose arrays Orbax reads.

    Attributes:
        path: a run folder or a checkpoint in it, as for ``restore.find``.
        model: the model with the shapes of its parameters.
        steps: the steps that the path may refer to, ascending.
    """

    path: Path
    model: StoredModel
    steps: list[int]


def open_weights(path: Path, *, use_ema: bool = True) -> Family | Run:
    """Opens weights without reading their arrays.

    Args:
        use_ema: use the moving average of the parameters, if it is a run that has one.
    """
    if file := _safetensors_file(path):
        return _open_safetensors(file)
    if path.is_dir():
        for pickle in sorted(path.glob("pytorch_model*.bin")):
            _refuse_pickle(pickle)
    if is_run(path):
        return _open_run(path, use_ema)
    if path.suffix == ".npz" and path.is_file():
        return from_flax.vit_npz(path)
    prefix = path.with_suffix("") if path.suffix == ".index" else path
    if chunked.exists(prefix):
        return from_flax.published(prefix)
    _refuse_pickle(path)
    remedy = f"give {FORMATS}"
    if path.exists():
        raise UsageError(f"{path}: no checkpoint of a known format; {remedy}")
    given = str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)
    remedy = models.hub_remedy(given) or choice(given, NAMES, otherwise=remedy)
    raise UsageError(f"{path}: no such file, folder or model; {remedy}")


def _refuse_pickle(path: str | Path) -> None:
    if str(path).endswith(PICKLES):
        raise UsageError(
            f"{path}: pickle files are not read, because reading one can run code; convert it: "
            "torch.load(FILE, weights_only=True), then safetensors.torch.save_file"
        )


def _safetensors_file(path: Path) -> Path | None:
    """The .safetensors file, or the index of several, that a path names; None if there is none."""
    if path.is_file() and path.name.endswith((".safetensors", safetensors_files.INDEX)):
        return path
    for name in (vmoe_format.MODEL, vmoe_format.MODEL + safetensors_files.INDEX):
        if (path / name).is_file():
            return path / name
    return None


def _open_safetensors(file: Path) -> Family:
    """A model written by vmoe, timm or Hugging Face: .safetensors files next to config.json."""
    place = file.with_name(vmoe_format.CONFIG)
    config = read_json(place)
    if not config:
        raise UsageError(
            f"{file}: there is no config.json next to it, so the number of attention heads and the "
            "activation are unknown; put the model's config.json there, of which for a ViT of timm "
            'its name is enough: {"architecture": "vit_base_patch16_224"}'
        )
    if config.get("format") == "jax.export":  # of export/jax_program.py
        raise UsageError(
            f"{file.parent}: a program of jax.export, see its README.md; give the checkpoint "
            "that it was exported from"
        )
    arrays = safetensors_files.read(file)
    with corrupt_if_wrong(place):
        if config.get("format") == "vmoe":
            return vmoe_format.family(arrays, config)
        if config.get("model_type") == "siglino":
            return from_siglino.family(arrays, config)
        if "architecture" in config:
            return from_timm.family(arrays, config)
        if "model_type" in config:
            return from_hugging_face.family(arrays, config)
    raise UsageError(
        f"{place}: it has neither architecture (timm), nor model_type (Hugging Face), nor format "
        "(vmoe)"
    )


def _open_run(path: Path, use_ema: bool) -> Run:
    workdir, steps = find(path)
    config = read_config(workdir)
    model = StoredModel(
        config=config.model,
        params=models.params_of(models.build_abstract(config.model)),
        class_names=tuple(read_class_names(workdir)),
        preprocessing=config.preprocessing,
        step=steps[-1],
        origin=Origin("run", path, "ema" if use_ema and config.ema_decay else "raw"),
        train_config=config,
        loss=config.loss,
    )
    return Run(path, model, steps)
