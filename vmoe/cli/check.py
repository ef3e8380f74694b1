"""``vmoe check``."""

import contextlib
import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from packaging.requirements import Requirement

import vmoe
from vmoe.cli.arguments import parse
from vmoe.cli.printing import print_json, print_table
from vmoe.errors import CheckFailed, UsageError, VmoeError, one_line
from vmoe.host import cache, compiler
from vmoe.host.cores import cores

FIRST = ("jax", "jaxlib", "flax", "numpy")  # the packages that decide numbers, listed first
EXTRAS = {  # of users; those of developers are in docs/install.md
    "remote": "weights at gs:// and https://",
    "hf": "weights at hf://, data sets of Hugging Face",
    "wandb": "vmoe train --wandb",
}
OTHER_BUILDS = {
    "opencv-python-headless": ("opencv-python", "opencv-contrib-python-headless"),
}
MODEL, SAMPLE = "vmoe_fashion_mnist", "fashion_mnist_sample"  # of whose first images it has logits
TOLERANCE = 1e-5  # of the largest logit
SIDE = 16  # pixels of the images that are decoded
LOSSY = 8  # levels by which a JPEG may differ on average, from the original and between decoders
NVIDIA = Path("/dev/nvidiactl")  # exists where NVIDIA's driver runs


@dataclasses.dataclass(frozen=True)
class CheckArgs:
    """Check this installation: versions, devices, computed numbers, decoders, extras, caches.

    Exits with status 3 if something is wrong. Run it after an installation, and before you report a
    problem.
    """

    json: bool = False
    """Print one JSON object and nothing else."""


class Row(NamedTuple):
    """A line of the report.

    Attributes:
        name: what was looked at.
        found: what was found there.
        problem: what is wrong with it, and the remedy; empty if nothing is.
    """

    name: str
    found: str
    problem: str = ""


def run(argv: Sequence[str]) -> None:
    """Checks the installation, and prints what was found."""
    args = parse(CheckArgs, "check", argv)
    sections = {
        "versions": list(_versions()),
        "devices": list(_devices()),
        "numbers": list(_numbers()),
        "decoders": list(_decoders()),
        "extras": list(_extras()),
        "folders": list(_folders()),
    }
    problems = [
        f"{row.name}: {row.problem}" for rows in sections.values() for row in rows if row.problem
    ]
    if args.json:
        report = {
            name: {row.name: {"found": row.found, "problem": row.problem or None} for row in rows}
            for name, rows in sections.items()
        }
        print_json(report | {"problems": problems})
    else:
        for name, rows in sections.items():
            shown = [(row.name, f"{'WRONG: ' * bool(row.problem)}{row.found}") for row in rows]
            print_table(("", ""), shown, title=name, prose=True)
        print("\n".join(map(one_line, problems)) or "all right")
    if problems:
        number = f"{len(problems)} problem{'s' * (len(problems) > 1)}"
        raise CheckFailed(f"{number}: {', '.join(each.partition(':')[0] for each in problems)}")


def _versions() -> Iterator[Row]:
    """This package, Python, and each package that this one requires."""
    folder = Path(vmoe.__file__).parent
    yield Row("vmoe", f"{_version('vmoe') or 'not installed'}, {folder}")
    yield Row("Python", f"{platform.python_version()}, {sys.executable}")
    yield Row("machine", f"{platform.system()} {platform.release()}, {platform.machine()}")
    needed = {each.name: each for each in _required() if not each.marker or each.marker.evaluate()}
    others = sorted(needed.keys() - {*FIRST})
    for name in (*FIRST, *others):
        wants = needed.get(name)
        version = next(filter(None, map(_version, (name, *OTHER_BUILDS.get(name, ())))), None)
        problem = compiler.known_wrong() if name == "jaxlib" else ""
        if not problem and wants and not (version and wants.specifier.contains(version, True)):
            problem = f"{version or 'nothing'} is installed, vmoe needs {wants}"
            problem += f": pip install '{wants}'"
        yield Row(name, version or "not installed", problem)


def _required() -> list[Requirement]:
    """What this package requires, also for its extras; nothing is known of a mere checkout."""
    lines = importlib.metadata.requires("vmoe") if _version("vmoe") else None
    return [Requirement(line) for line in lines or ()]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[Row]:
    from vmoe.distributed import check_devices

    try:
        check_devices()
    except (VmoeError, RuntimeError, AssertionError) as error:
        yield Row("JAX", "no device", str(error))
        return
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    backend = jax.default_backend()
    problem = ""
    if backend == "cpu" and NVIDIA.exists() and not os.environ.get("JAX_PLATFORMS"):
        problem = "an NVIDIA GPU is here and JAX does not use it: pip install 'vmoe[cuda]'"
    shown = ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds))
    yield Row("JAX", f"{backend}: {shown}", problem)
    yield Row("cores", str(cores()))
    for name in ("JAX_PLATFORMS", "XLA_FLAGS"):
        if value := os.environ.get(name):
            yield Row(name, value)


def _numbers() -> Iterator[Row]:
    """A program with a known result, and a stored prediction of a packaged model."""
    from vmoe.distributed import check_devices

    name = f"squares of 0 to {compiler.ROWS - 1:,}"
    try:
        check_devices()
        wrong = compiler.wrong_rows()
        problem = ""
        if wrong:
            problem = f"JAX computes wrong numbers here ({wrong[-1]}): {compiler.REMEDY}"
        yield Row(name, f"{len(wrong)} wrong", problem)
    except (VmoeError, RuntimeError, AssertionError) as error:
        yield Row(name, f"not computed: {error}")
    else:
        yield _prediction()


def _prediction() -> Row:
    """The largest difference from the stored logits, relative to the largest of them."""
    import jax

    from vmoe import models
    from vmoe.data.sources import open_source
    from vmoe.factory import load
    from vmoe.nn.vit import ViT
    from vmoe.zoo import MEASURED, PACKAGED

    stored = json.loads((PACKAGED / MODEL / MEASURED).read_bytes())["logits"]
    loaded, source = load(MODEL), open_source(SAMPLE, "test")
    expected = np.array(stored, np.float32)
    images = loaded.preprocess([source[i].image for i in range(len(expected))])
    with jax.default_matmul_precision("highest"):  # GPUs round the factors to 10 bits otherwise
        computed = np.asarray(models.compiled(ViT.__call__)(loaded.model)(images))
    difference = float(np.abs(computed - expected).max() / np.abs(expected).max())
    problem = ""
    if not difference <= TOLERANCE:
        problem = (
            f"its logits on {len(expected)} images of {SAMPLE} differ from the stored "
            f"ones by {difference:.1e} of the largest, more than {TOLERANCE}: report it with this "
            "output"
        )
    return Row(MODEL, f"logits differ by {difference:.1e} of the largest", problem)


def _decoders() -> Iterator[Row]:
    """A tiny image of each format, decoded by both decoders."""
    from vmoe.data.decode import FORMATS

    yield from map(_decoder, FORMATS)


def _decoder(kind: str) -> Row:
    from PIL import Image

    from vmoe.data.decode import decode
    from vmoe.data.fast_decode import decode_crop_and_resize
    from vmoe.data.random_crop import Box

    i = np.arange(SIDE, dtype=np.uint8) * (256 // SIDE)
    original = np.stack(np.broadcast_arrays(i, i[:, None], 128), -1).astype(np.uint8)
    lossless = {"lossless": True} if kind == "WEBP" else {}
    file = io.BytesIO()
    try:
        Image.fromarray(original).save(file, format=kind, **lossless)
        exact = decode(file.getvalue(), kind)
        fast, by_exact = decode_crop_and_resize(
            file.getvalue(), kind, lambda h, w: Box(0, 0, h, w), SIDE
        )
    except (UsageError, OSError, KeyError, RuntimeError) as error:  # a Pillow without the format
        return Row(kind, "cannot be read", f"{error}: pip install --force-reinstall pillow")
    off = [float(np.abs(each - original.astype(float)).mean()) for each in (exact, fast)]
    # A GIF has a palette, which this image fits; only a JPEG is lossy.
    limit = LOSSY if kind == "JPEG" else 0
    problem = ""
    if max(off) > limit:
        problem = (
            f"it is decoded {off[0]:.1f} (exact) and {off[1]:.1f} (fast) levels off on average"
        )
    return Row(kind, "exact" if by_exact else "exact, fast", problem)


def _extras() -> Iterator[Row]:
    """The extras for users; one that is missing is no problem."""
    for extra, purpose in EXTRAS.items():
        packages = [
            each.name
            for each in _required()
            if each.marker and each.marker.evaluate({"extra": extra}) and not each.marker.evaluate()
        ]
        missing = [name for name in packages if not _version(name)]
        state = "installed" if packages else "unknown, as vmoe is not installed"
        if missing:
            state = f"{', '.join(missing)} missing: pip install 'vmoe[{extra}]'"
        yield Row(extra, f"{purpose}; {state}")
    from vmoe.checkpoints.export.onnx_file import INSTALL

    missing = not all(map(_version, ("jax2onnx", "onnx")))
    remedy = f"jax2onnx missing: {INSTALL}" if missing else "installed"
    yield Row("onnx", f"vmoe convert --format onnx; {remedy}")


def _folders() -> Iterator[Row]:
    """The caches, their sizes and the free space of their disks."""
    import jax

    own = cache.cache_folder()
    hub = os.environ.get("HF_HOME") or own.with_name("huggingface")
    data = os.environ.get("TFDS_DATA_DIR") or os.path.expanduser("~/tensorflow_datasets")
    programs = jax.config.values["jax_compilation_cache_dir"]
    yield _folder("vmoe's cache", own, variable="XDG_CACHE_HOME")
    if programs:
        yield _folder("compiled programs", Path(programs), variable="JAX_COMPILATION_CACHE_DIR")
    else:
        yield Row(
            "compiled programs",
            "not kept: JAX_COMPILATION_CACHE_DIR is empty, or the cache folder cannot be written",
        )
    yield _folder("Hugging Face", Path(hub))
    yield _folder("TFDS", Path(data))


def _folder(name: str, folder: Path, *, variable: str = "") -> Row:
    """A folder, its size, and the free space of its disk.

    Args:
        variable: the environment variable that names another folder; if it is given, it is a
            problem if the folder cannot be written.
    """
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    free = f"{shutil.disk_usage(there).free / 1e9:,.1f} GB free"
    size = f"{_size(folder) / 1e6:,.1f} MB" if folder.exists() else "not made yet"
    problem = ""
    if variable and not there.is_dir():
        problem = f"{there} is not a folder: remove it, or set {variable}"
    elif variable and not os.access(there, os.W_OK | os.X_OK):
        problem = f"{there} cannot be written: make it writable, or set {variable}"
    return Row(name, f"{folder}: {size}, {free}", problem)


def _size(folder: Path) -> int:
    """The bytes of the files below a folder; links are not followed."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process has removed it
                total += os.lstat(os.path.join(place, name)).st_size
    return total
