"""Models all of whose parameters are random, as a reader returns them, and images for them."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vmoe import models
from vmoe.checkpoints.stored import Origin, StoredModel
from vmoe.config.preprocessing import Preprocessing
from vmoe.nn.vit import ViT


def stored_model(name: str, **overrides: Any) -> StoredModel:
    """A named model; biases are about 0.1, and the logits are not all the same."""
    config = models.model_config(name, head_std=1.0, **overrides)
    leaves, tree = jax.tree.flatten(nnx.to_pure_dict(nnx.state(models.build(config), nnx.Param)))
    rng = np.random.default_rng(0)
    noisy = [x + rng.normal(0, 0.02, x.shape) for x in leaves]
    params = jax.tree.unflatten(tree, [np.asarray(x, np.float32) for x in noisy])
    names = tuple(f"class {i}" for i in range(config.num_classes))
    preprocessing = Preprocessing(config.image_size)
    return StoredModel(config, params, names, preprocessing, None, Origin("vmoe", Path("random")))


def model_of(stored: StoredModel) -> ViT:
    """The model itself."""
    return models.with_params(stored.config, jax.tree.map(jnp.asarray, stored.params))


def random_images(stored: StoredModel, b: int) -> np.ndarray:
    """f32[b h w 3] in [-1, 1], of the size that the preprocessing makes."""
    size = stored.preprocessing.image_size
    return np.random.default_rng(b).uniform(-1, 1, (b, size, size, 3)).astype(np.float32)
