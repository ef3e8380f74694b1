"""Small models whose parameters are all random, and their logits."""

from typing import Any

import jax
import numpy as np
from flax import nnx

from vmoe.config import ViTConfig
from vmoe.surgery.params import nested, shapes


def random_params(config: ViTConfig, seed: int = 0) -> dict[Any, Any]:
    """Parameters none of which is zero, so that each of them matters."""
    rng = np.random.default_rng(seed)
    values = {
        path: np.float32(0.3 * rng.standard_normal(shape) + (path[-1] == "scale"))
        for path, shape in shapes(config).items()
    }
    return jax.tree.map(jax.numpy.asarray, nested(values))


def images(size: int = 32) -> jax.Array:
    return jax.random.uniform(jax.random.key(1), (2, size, size, 3), minval=-1, maxval=1)


@jax.jit(static_argnums=0)
def _outputs(graph: nnx.GraphDef, state: nnx.State, x: jax.Array) -> jax.Array:
    return nnx.merge(graph, state, copy=True)(x)


def outputs(model: nnx.Module, x: jax.Array) -> jax.Array:
    return _outputs(*nnx.split(model), x)
