"""Position embeddings, for any grid of patches."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vmoe.nn.keys import Rngs


class LearnedPositions(nnx.Module):
    """One learned vector for each patch of the grid, and one for the class token.

    For another grid the vectors are resampled linearly with aligned corners, as in the published
    fine-tuning (``scipy.ndimage.zoom`` of order 1).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        width: int,
        *,
        class_token: bool,
        std: float = 0.02,
        rngs: Rngs,
    ):
        self.grid = grid
        self.class_token = class_token
        n = grid[0] * grid[1] + class_token
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (1, n, width)))

    def __call__(self, i: int, j: int) -> Float[Array, "1 n d"]:
        embedding = self.embedding[...]
        if (i, j) == self.grid:
            return embedding
        first = int(self.class_token)
        positions = embedding[0, first:].reshape(*self.grid, -1)
        positions = resample(positions, i, j).reshape(1, i * j, -1)
        return jnp.concatenate([embedding[:, :first], positions], axis=1)


def resample(positions: Float[Array, "i0 j0 d"], i: int, j: int) -> Float[Array, "i j d"]:
    """Resamples a grid of vectors to (i, j): linear between neighbors, with aligned corners."""
    for axis, new in enumerate((i, j)):
        old = positions.shape[axis]
        at = np.linspace(0, old - 1, new)  # in float64: float32 is off by 3e-6 of the result
        before = np.floor(at).astype(int)
        after = np.minimum(before + 1, old - 1)
        weight = jnp.asarray(np.expand_dims(at - before, (1 - axis, 2)), positions.dtype)
        low, high = jnp.take(positions, before, axis), jnp.take(positions, after, axis)
        positions = low + (high - low) * weight
    return positions


class SinCosPositions(nnx.Module):
    """Fixed sines and cosines of the column and the row; zeros for the class token.

    Order: sin x, cos x, sin y, cos y, with width / 4 values each; wavelengths from 2 pi to
    10,000 * 2 pi (Vaswani et al. 2017, in two dimensions).
    """

    def __init__(self, width: int, *, class_token: bool):
        self.width = width
        self.class_token = class_token

    def __call__(self, i: int, j: int) -> Float[Array, "1 n d"]:
        quarter = self.width // 4
        frequency = 10_000.0 ** -(jnp.arange(quarter) / max(quarter - 1, 1))
        y, x = (indices.reshape(-1, 1) * frequency for indices in jnp.mgrid[:i, :j])
        table = jnp.concatenate([jnp.sin(x), jnp.cos(x), jnp.sin(y), jnp.cos(y)], axis=1)
        return jnp.pad(table, ((int(self.class_token), 0), (0, 0)))[None]


class NoPositions(nnx.Module):
    """No position embeddings: the model treats an image as a bag of patches."""

    def __call__(self, i: int, j: int) -> Float[Array, ""]:
        return jnp.zeros(())
