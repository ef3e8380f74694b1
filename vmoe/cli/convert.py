"""``vmoe convert``."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from vmoe.cli.arguments import parse
from vmoe.config import RoutingOverrides
from vmoe.errors import one_line


@dataclasses.dataclass(frozen=True)
class ConvertArgs:
    """Write a trained model in another format.

    Example: `vmoe convert runs/digits digits_weights`
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Trained model, as for `vmoe evaluate --checkpoint`."""
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DESTINATION")]
    """vmoe and jax: a new folder; vmoe also takes hf://OWNER/NAME, where a new repository is public
    by default. published: the prefix of the files. onnx: a file NAME.onnx."""
    format: Literal["vmoe", "published", "jax", "onnx"] = "vmoe"
    """vmoe: a folder with safetensors, config.json and a model card; published: files for the V-MoE
    authors' code; jax, onnx: a program that runs without vmoe, with one image per group."""
    shards: int = 1
    """Number of data files of a published checkpoint."""
    routing: RoutingOverrides = RoutingOverrides()
    """Routing settings that replace the trained ones."""
    use_ema: bool = True
    """Use the moving average of the parameters, if the run has one."""

    no_effect: ClassVar[dict[str, str]] = {
        "shards": "without format=published",
        "routing": "with format=published",
        "routing.images_per_group": "with format=jax|onnx",
    }


def run(argv: Sequence[str]) -> None:
    """Reads a trained model and writes it."""
    args = parse(ConvertArgs, "convert", argv)
    from vmoe.checkpoints import read, write
    from vmoe.checkpoints.export import onnx_file
    from vmoe.trees import by_name

    if args.format == "onnx":
        onnx_file.check_installed()
    stored = read(args.source, use_ema=args.use_ema)
    stored = stored._replace(config=args.routing.apply(stored.config))
    written = write(stored, args.destination, format=args.format, shards=args.shards)
    if stored.origin.unused:
        unused = one_line(", ".join(stored.origin.unused))
        print(f"left out, since the model does not use them: {unused}", file=sys.stderr)
    count = sum(leaf.size for leaf in by_name(stored.params).values())
    print(f"{written}: {count:,} parameters in format {args.format}")
    if args.format == "onnx":
        size = stored.preprocessing.image_size
        print(
            f"it takes f32[b, {size}, {size}, 3] in [-1, 1]: "
            f"onnxruntime.InferenceSession({str(written)!r}).run(None, {{'images': images}})"
        )
    if args.format == "published":
        print(
            "it holds no class names, no preprocessing and no routing settings (router, k, "
            "capacity, ...)"
        )
