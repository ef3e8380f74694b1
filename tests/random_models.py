"""Small models whose parameters are all random, images for them, and their compiled outputs."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict

from vmoe import models
from vmoe.axes import Record
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.config import GridRotary, ViTConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.nn.vit import ViT
from vmoe.surgery.params import shapes


def random_params(config: ViTConfig, seed: int = 0) -> dict[Any, Any]:
    """Parameters without zeros, so that each of them matters."""
    rng = np.random.default_rng(seed)
    values = {
        path: np.float32(0.3 * rng.standard_normal(shape) + (path[-1] == "scale"))
        for path, shape in shapes(config).items()
    }
    return jax.device_put(unflatten_dict(values))


PARTS: dict[str, Any] = dict(
    **dict(registers=3, rotary=GridRotary(), mlp="gated_norm", norm="rms", attention_norm=True),
    **dict(head_dim=12, qk_rms=True, attention_sink=True, activation="silu"),
)
"""The parts of later ViTs, each in another arrangement than by default."""


def stored_model(name: str, **overrides: Any) -> StoredModel:
    """A named model, in the form that a reader returns."""
    return stored_of(models.model_config(name, **overrides))


def stored_of(config: ViTConfig) -> StoredModel:
    """The model of a config, in the form that a reader returns."""
    params = jax.tree.map(np.asarray, random_params(config))
    names = tuple(f"class {i}" for i in range(config.num_classes))
    preprocessing = Preprocessing(config.image_size)
    return StoredModel(config, params, names, preprocessing, None, Origin("vmoe", Path("random")))


def model_of(stored: StoredModel) -> ViT:
    """The model itself."""
    return models.with_params(stored.config, jax.device_put(stored.params))


def random_images(size: int = 32, b: int = 2) -> np.ndarray:
    """f32[b h w 3] in [-1, 1]."""
    return np.random.default_rng(b).uniform(-1, 1, (b, size, size, 3)).astype(np.float32)


@models.compiled
def _outputs(model: nnx.Module, x: jax.Array) -> jax.Array:
    return model(x)


def outputs(model: nnx.Module, x: jax.typing.ArrayLike) -> jax.Array:
    """The outputs of a model, as one program that models with other parameters share."""
    return _outputs(model)(x)


@models.compiled
def _forward(model: ViT, images: jax.Array, valid: Any) -> tuple[jax.Array, dict[int, Record]]:
    return model.forward(images, valid=valid)


def forward(
    model: ViT, images: jax.typing.ArrayLike, valid: jax.typing.ArrayLike | None = None
) -> tuple[jax.Array, dict[int, Record]]:
    """The logits, and the record of each sparse block, as one program."""
    return _forward(model)(images, valid)
