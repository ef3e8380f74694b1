"""Models as programs of ``jax.export``: a folder that needs jax, numpy and safetensors, not vmoe.

    model.jaxexport      the program (parameters, images) -> logits, for CPU, CUDA and TPU
    model.safetensors    the parameters by path; large ones in several files, with an index
    config.json          inputs, outputs, class names, preprocessing, SHA-256 of the files
    README.md            how to run it

Each image is its own group, so an image does not depend on its batch and the number of images is
free. The experts use ``batched``, the implementation that suits all platforms.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vmoe import models
from vmoe.checkpoints.stored import StoredModel
from vmoe.checkpoints.vmoe_format import SHARD, new_folder, write_arrays, write_config
from vmoe.config import ViTConfig
from vmoe.trees import by_name, nested

FORMAT, VERSION = "jax.export", 1
PROGRAM, README = "model.jaxexport", "README.md"
PLATFORMS = ("cpu", "cuda", "tpu")

EXAMPLE = """\
from pathlib import Path

import jax.export
import numpy as np
from safetensors.numpy import load_file

program = jax.export.deserialize(Path("model.jaxexport").read_bytes())
params = {{}}
for path in Path().glob("model*.safetensors"):
    params |= load_file(path)
images = np.zeros((2, {size}, {size}, 3), np.float32)  # pixels in [-1, 1]
logits = jax.jit(program.call)(params, images)
print(logits.shape)
"""

TEXT = """\
# A vision model as a program

Input: RGB images, float32 (b, {size}, {size}, 3) in [-1, 1], any number of them. Output: {output},
float32 (b, {width}). `config.json` has the class names in the order of the logits, how images are
resized and cropped, and the SHA-256 of each file.

It runs on CPU, CUDA and TPU, with jax {jax} or later, flatbuffers, numpy and safetensors. In this
folder:
```python
{example}```
Each image is routed on its own, so its result does not depend on the rest of the batch. JAX
promises to read such a program for at least six months after the version that wrote it. There are
no gradients.
"""


def write(folder: Path, stored: StoredModel, *, shard_bytes: int = SHARD) -> None:
    """Writes a model as a program; config.json is written last.

    To write a model with other routing settings, apply them to ``stored.config`` first. The image
    size is taken from the preprocessing.

    Args:
        folder: a new or an empty folder.
        shard_bytes: largest size of a file of parameters; only a single larger array exceeds it.
    """
    arrays = {name: np.asarray(leaf) for name, leaf in by_name(stored.params).items()}
    size = stored.preprocessing.image_size
    with new_folder(folder):
        program = export(stored.config, arrays, size)
        (folder / PROGRAM).write_bytes(program.serialize())
        files = [PROGRAM, *write_arrays(folder, arrays, shard_bytes)]
        width = program.out_avals[0].shape[1]
        text = TEXT.format(
            size=size,
            output="logits" if stored.config.num_classes else "features",
            width=width,
            jax=jax.__version__,
            example=EXAMPLE.format(size=size),
        )
        (folder / README).write_text(text, encoding="utf-8")
        content = {
            "format": FORMAT,
            "version": VERSION,
            "jax": jax.__version__,
            "calling_convention": program.calling_convention_version,
            "platforms": PLATFORMS,
            "inputs": {
                "params": {"arrays": len(arrays), "names": "those in the .safetensors files"},
                "images": {"shape": ["b", size, size, 3], "dtype": "float32", "range": [-1, 1]},
            },
            "outputs": {"logits": {"shape": ["b", width], "dtype": "float32"}},
            "images_per_group": 1,
        }
        write_config(folder, stored, content, files)


def export(config: ViTConfig, params: dict[str, Any], image_size: int) -> jax.export.Exported:
    """The program (parameters by path, images f32[b h w 3]) -> logits f32[b y], for any b."""
    config = config.with_layers(
        lambda moe: dataclasses.replace(moe, experts=moe.experts.computed("batched"))
    )

    def logits(params: dict[str, jax.Array], images: jax.Array) -> jax.Array:
        model = models.with_params(config, nested(params))
        return jax.vmap(lambda image: model(image[None])[0])(images)

    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in params.items()}
    batch = jax.export.symbolic_shape(f"b, {image_size}, {image_size}, 3")
    images = jax.ShapeDtypeStruct(batch, jnp.float32)
    return jax.export.export(jax.jit(logits), platforms=PLATFORMS)(shapes, images)
