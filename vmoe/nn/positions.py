"""Position embeddings, for any grid of patches."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vmoe.config.rotary import GridRotary, Rotary
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


def rotation(rotary: Rotary, i: int, j: int, z: int, before: int) -> Float[Array, "2 n z"]:
    """Cosines and sines of the angles by which rotary positions rotate the tokens of an image.

    Angle k of the z / 4 for a row, and of the z / 4 for a column, is c / base ** (4 k / z). For
    ``CenteredRotary`` c = 2 pi (2 (y + 1/2) / i - 1) for row y of i, and the pairs that are rotated
    are (k, k + z / 2); for ``GridRotary`` c = y / i * side, and they are (2 k, 2 k + 1). Tokens
    before the patches have angle 0.

    Args:
        z: width of a head.
        before: number of tokens before the patches.

    Sources: DINOv3 (arXiv 2508.10104; RopePositionEmbedding of its code) and EVA-02 (arXiv
    2303.11331), as in timm 1.0.31, layers/pos_embed_sincos.py.
    """
    if isinstance(rotary, GridRotary):
        axes = [np.arange(n) / n * rotary.side for n in (i, j)]
    else:
        axes = [2 * np.pi * (2 * (np.arange(n) + 0.5) / n - 1) for n in (i, j)]
    bands = rotary.base ** -(np.arange(z // 4) * 4 / z)
    y, x = (each.reshape(-1, 1) * bands for each in np.meshgrid(*axes, indexing="ij"))
    angles = np.concatenate([y, x], axis=1)
    angles = angles.repeat(2, axis=1) if isinstance(rotary, GridRotary) else np.tile(angles, 2)
    angles = np.pad(angles, ((before, 0), (0, 0)))
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)


def rotate(
    heads: Float[Array, "b n a z"], table: Float[Array, "2 m z"], rotary: Rotary
) -> Float[Array, "b n a z"]:
    """Rotates pairs of values of the first n tokens; see ``rotation``, which makes the table."""
    cos, sin = table[:, : heads.shape[1], None]
    if isinstance(rotary, GridRotary):
        turned = jnp.stack([-heads[..., 1::2], heads[..., ::2]], axis=-1).reshape(heads.shape)
    else:
        first, second = jnp.split(heads, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
    return (heads * cos + turned * sin).astype(heads.dtype)


class NoPositions(nnx.Module):
    """No position embeddings: the model treats an image as a bag of patches."""

    def __call__(self, i: int, j: int) -> Float[Array, ""]:
        return jnp.zeros(())
