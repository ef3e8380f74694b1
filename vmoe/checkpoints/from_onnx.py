"""The backbone of transformers' DINOv2 in an ONNX file that PyTorch exported.

The export keeps the names of vectors. Matrices and positions are constants with a number as their
name; the operation that uses one has the name of its module. What follows the backbone is not used.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from vmoe.checkpoints import from_hugging_face, onnx_graph
from vmoe.checkpoints.arrays import ArrayFile, ArrayInfo
from vmoe.checkpoints.family import Family, Transform, corrupt_if_wrong, read_json
from vmoe.checkpoints.onnx_graph import Graph
from vmoe.config.preprocessing import Preprocessing
from vmoe.errors import UsageError, naming
from vmoe.nn.positions import resample

CLASS = "embeddings.cls_token"
HEAD_WIDTH = 64  # channels of an attention head, in every DINOv2
LARGEST = 256  # patches along a side
MOST_TIMES = 4  # as many patches along a side after resampling
REMEDY = "give the checkpoint that the file was exported from"
BICUBIC = {  # PyTorch's settings of Resize, which but for the mode are ONNX's defaults
    **{"mode": "cubic", "coordinate_transformation_mode": "half_pixel"},
    **{"cubic_coeff_a": -0.75, "antialias": 0, "exclude_outside": 0},
}


def family(path: Path) -> Family:
    """A backbone, with the config.json next to its file, if there is one."""
    graph = onnx_graph.read(path)
    prefixes = [name.removesuffix(CLASS) for name in graph.arrays if name.endswith(CLASS)]
    if len(prefixes) > 1:
        raise UsageError(
            f"{path}: several backbones, {' and '.join(x + CLASS for x in prefixes)}: export one "
            "of them alone"
        )
    prefix = "".join(prefixes)
    registers = f"{prefix}embeddings.register_tokens" in graph.arrays
    if registers or not prefixes:
        raise UsageError(
            f"{path}: {'it has register tokens' if registers else f'no array is {CLASS}'}; of ONNX "
            f"files, only transformers' DINOv2 without registers is opened; {REMEDY}"
        )
    place = path.with_name("config.json")
    config = read_json(place)
    width = graph.arrays[prefix + CLASS].size
    heads = width // HEAD_WIDTH
    if not config and heads * HEAD_WIDTH != width:
        raise UsageError(
            f"{path}: width {width} is no multiple of {HEAD_WIDTH}, so the number of attention "
            "heads is unknown; put the model's config.json next to the file"
        )
    with naming(path), corrupt_if_wrong(path):
        arrays = _arrays(graph, prefix)
    infos = {name: ArrayInfo(array.shape, array.dtype) for name, array in arrays.items()}
    file = ArrayFile(path, infos, lambda names: ((x, arrays[x]) for x in infos if x in names))
    with corrupt_if_wrong(place):
        given = config or {
            "model_type": "dinov2",
            "num_attention_heads": heads,
            "use_swiglu_ffn": any(name.endswith("mlp.weights_in.weight") for name in arrays),
        }
        found = from_hugging_face.family(file, given)

    def rename(name: str, shape: tuple[int, ...]) -> Mapping[str, Transform]:
        own = name.startswith(prefix)
        return found.rename(name.removeprefix(prefix), shape) if own else {}

    def prepared(image_size: int) -> tuple[Preprocessing, list[str]]:
        preprocessing, assumed = found.prepared(image_size)
        if not config:
            settings = [f"attention heads of {HEAD_WIDTH} channels: {heads}"]
            settings.append("SwiGLU" if given["use_swiglu_ffn"] else "exact GELU")
            settings.append(f"norms with epsilon {found.given['norm_epsilon']}")
            assumed = settings + assumed
        return preprocessing, assumed

    return found._replace(rename=rename, prepared=prepared)


def _arrays(graph: Graph, prefix: str) -> dict[str, np.ndarray]:
    """All arrays; the constants of the backbone by the names that they had before the export."""
    arrays = dict(graph.arrays)
    embeddings: dict[str, np.ndarray] = {}
    resampled = {}
    for node in graph.nodes:
        module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        if module == f"{prefix}embeddings" and node.kind == "Resize":
            resampled = node.settings | {"factor": "".join(node.inputs[2:3])}
        for name in node.inputs:
            if f"::{node.kind}" not in name or not module.startswith(prefix) or name not in arrays:
                continue
            if node.kind == "MatMul":
                if f"{module}.weight" in arrays:
                    raise ValueError(f"two arrays are {module}.weight")
                arrays[f"{module}.weight"] = arrays.pop(name).T
            elif module == f"{prefix}embeddings":
                embeddings[node.kind] = arrays.pop(name)
    if {"Concat", "Reshape"} <= embeddings.keys():
        kernel = arrays.get(f"{prefix}embeddings.patch_embeddings.projection.weight")
        if kernel is None:
            raise ValueError("it has no patch_embeddings.projection.weight")
        patches = _resized(embeddings["Reshape"], graph, kernel.shape, resampled)
        positions = np.concatenate([embeddings["Concat"], patches], axis=1)
        arrays[f"{prefix}embeddings.position_embeddings"] = positions
    return arrays


def _side(graph: Graph, kernel: tuple[int, ...]) -> int | None:
    """Patches along a side of the graph's images; None if their size is free."""
    *_, height, width = (None, None, *graph.input_shape)
    *_, patch = kernel
    if height is None or width is None:
        return None
    if height != width or not patch <= width < (LARGEST + 1) * patch:
        raise UsageError(
            f"images of {height} x {width} pixels in patches of {patch}: opened are square images "
            f"of 1 to {LARGEST} patches along a side; {REMEDY}"
        )
    return width // patch


def _resized(
    positions: np.ndarray,
    graph: Graph,
    kernel: tuple[int, ...],
    settings: Mapping[str, str | float],
) -> np.ndarray:
    """Positions of patches, 1 n d, resampled to a square as the graph's Resize does, if any."""
    _, patches, _ = positions.shape
    old = math.isqrt(patches)
    side = _side(graph, kernel) if settings else None
    if side is None or side == old:
        return positions
    if side > MOST_TIMES * old:
        raise UsageError(
            f"{patches:,} positions are resized to {side} x {side}, at most {MOST_TIMES} times as "
            f"many along a side are opened; {REMEDY}"
        )
    found = {**BICUBIC, "mode": "nearest", "factor": "", **settings}
    if found != {**found, **BICUBIC, "factor": ""}:
        raise UsageError(
            f"positions are resized by {settings!r:.200}, opened is bicubically to a size; {REMEDY}"
        )
    with np.errstate(over="ignore"):  # the result is checked
        places = jnp.asarray(positions.reshape(old, old, -1).astype(np.float32))
    return np.asarray(resample(places, side, side, "bicubic")).reshape(1, side * side, -1)
