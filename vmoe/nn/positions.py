"""Position embeddings, for any grid of patches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from scipy.special import ndtri

from vmoe.config.model import Resampling
from vmoe.config.rotary import CenteredRotary, GoldenRotary, GridRotary, Rotary
from vmoe.nn.keys import Rngs


class LearnedPositions(nnx.Module):
    """One learned vector for each patch of the grid, and one for the class token.

    For another grid the vectors of patches are resampled, see ``resample``.
    """

    def __init__(
        self,
        grid: tuple[int, int],
        width: int,
        *,
        class_token: bool,
        resampling: Resampling,
        std: float = 0.02,
        rngs: Rngs,
    ):
        self.grid = grid
        self.resampling: Resampling = resampling
        self.class_token = class_token
        n = grid[0] * grid[1] + class_token
        self.embedding = nnx.Param(std * jax.random.normal(rngs.params(), (1, n, width)))

    def __call__(self, i: int, j: int) -> Float[Array, "1 n d"]:
        embedding = self.embedding[...]
        if (i, j) == self.grid:
            return embedding
        first = int(self.class_token)
        positions = embedding[0, first:].reshape(*self.grid, -1)
        positions = resample(positions, i, j, self.resampling).reshape(1, i * j, -1)
        return jnp.concatenate([embedding[:, :first], positions], axis=1)


def resample(
    positions: Float[Array, "i0 j0 d"], i: int, j: int, method: Resampling
) -> Float[Array, "i j d"]:
    """Resamples a grid of vectors to (i, j), one axis after the other.

    Sources: ``scipy.ndimage.zoom`` of order 1, by which the V-MoE authors and big_vision resample
    positions for fine-tuning; ``torch.nn.functional.interpolate`` of bicubic mode, with and without
    antialiasing.
    """
    rows, columns = (
        jnp.asarray(_weights(old, new, method), positions.dtype)
        for old, new in zip(positions.shape[:2], (i, j), strict=True)
    )
    product = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    return product("jl,ild->ijd", columns, product("ik,kld->ild", rows, positions))


def _weights(old: int, new: int, method: Resampling) -> Float[np.ndarray, "new old"]:
    """The weights of the old places in each new one; in float64, since float32 is off by 3e-6.

    Places are numbered from 0. Those of bilinear resampling go from the first to the last; those of
    bicubic resampling are centers of equal parts of the same length. Without antialiasing an edge
    is continued by its own vectors; with it, vectors beyond an edge count for nothing.
    """
    if method == "bilinear":
        at = np.linspace(0, old - 1, new)
        return np.maximum(1 - np.abs(at[:, None] - np.arange(old)), 0)
    at = (np.arange(new) + 0.5) * old / new - 0.5
    if method == "bicubic_antialias":
        weights = _cubic((at[:, None] - np.arange(old)) / max(old / new, 1), -0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    weights = _cubic(at[:, None] - np.arange(-2, old + 2), -0.75)
    weights[:, 2] += weights[:, :2].sum(axis=1)
    weights[:, -3] += weights[:, -2:].sum(axis=1)
    return weights[:, 2:-2]


def _cubic(x: Float[np.ndarray, "new old"], a: float) -> Float[np.ndarray, "new old"]:
    """The kernel of cubic convolution with slope ``a`` at 1 (Keys 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x**2 + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


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


def rotation(
    rotary: Rotary, i: int, j: int, a: int, z: int, before: int
) -> Float[Array, "2 n _ z"]:
    """Cosines and sines of the angles by which rotary positions rotate the tokens of an image.

    They have one axis for the heads, of length 1 if the angles of all heads are the same.

    Angle k of the z / 4 for a row, and of the z / 4 for a column, is c / base ** (4 k / z). For
    ``CenteredRotary`` c = 2 pi (2 (y + 1/2) / i - 1) for row y of i, and the pairs that are rotated
    are (k, k + z / 2); for ``GridRotary`` c = y / i * side, and they are (2 k, 2 k + 1). Tokens
    before the patches have angle 0. For ``GoldenRotary`` see ``_golden_angles``.

    Args:
        a: number of heads.
        z: width of a head.
        before: number of tokens before the patches.

    Sources: DINOv3 (arXiv 2508.10104; RopePositionEmbedding of its code) and EVA-02 (arXiv
    2303.11331), as in timm 1.0.31, layers/pos_embed_sincos.py.
    """
    if isinstance(rotary, GoldenRotary):
        angles = _golden_angles(rotary, i, j, a, z)
    else:
        if isinstance(rotary, GridRotary):
            axes = [np.arange(n) / n * rotary.side for n in (i, j)]
        else:
            axes = [2 * np.pi * (2 * (np.arange(n) + 0.5) / n - 1) for n in (i, j)]
        bands = rotary.base ** -(np.arange(z // 4) * 4 / z)
        y, x = (each.reshape(-1, 1, 1) * bands for each in np.meshgrid(*axes, indexing="ij"))
        angles = np.concatenate([y, x], axis=-1)
        centered = isinstance(rotary, CenteredRotary)
        angles = np.tile(angles, 2) if centered else angles.repeat(2, axis=-1)
    angles = np.pad(angles, ((before, 0), (0, 0), (0, 0)))
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)


def _golden_angles(
    rotary: GoldenRotary, i: int, j: int, a: int, z: int
) -> Float[np.ndarray, "n a z"]:
    """The angle of a pair of values is the position along the pair's direction times its frequency.

    Rows go from -(i / j) ** (1 / 2) to (i / j) ** (1 / 2), and columns likewise, with patches on
    both edges. The pairs are (2 k, 2 k + 1) in the second half of a head, with rising frequencies.
    Directions r = 1, 2, ... over all heads are normalized normal quantiles of the fractions of
    r / g and r / g ** 2, where g ** 3 = g + 1; they cover the circle evenly.
    """
    g = 2.0
    for _ in range(10):  # the authors' approximation, of which 1e-7 shows in the last directions
        g = (1 + g) ** (1 / 3)
    ranks = np.arange(1, a * (z // 4) + 1)[:, None]
    directions = ndtri(np.mod(ranks * g ** -np.arange(1.0, 3.0), 1.0))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    steps = np.linspace(0, 1, z // 4)
    frequencies = rotary.lowest * (rotary.highest / rotary.lowest) ** steps
    waves = directions.reshape(a, z // 4, 2) * frequencies[:, None]
    y, x = (np.sqrt(n / m) * np.linspace(-1, 1, n) for n, m in ((i, j), (j, i)))
    grid = np.stack(np.meshgrid(y, x, indexing="ij"), axis=-1).reshape(i * j, 2)
    angles = np.einsum("nx,akx->nak", grid, waves).repeat(2, axis=-1)
    return np.pad(angles, ((0, 0), (0, 0), (z - angles.shape[-1], 0)))


def rotate(
    heads: Float[Array, "b n a z"], table: Float[Array, "2 m #a z"], rotary: Rotary
) -> Float[Array, "b n a z"]:
    """Rotates pairs of values of the first n tokens; see ``rotation``, which makes the table."""
    cos, sin = table[:, : heads.shape[1]]
    if isinstance(rotary, CenteredRotary):
        first, second = jnp.split(heads, 2, axis=-1)
        turned = jnp.concatenate([-second, first], axis=-1)
    else:
        turned = jnp.stack([-heads[..., 1::2], heads[..., ::2]], axis=-1).reshape(heads.shape)
    return (heads * cos + turned * sin).astype(heads.dtype)


class NoPositions(nnx.Module):
    """No position embeddings: the model treats an image as a bag of patches."""

    def __call__(self, i: int, j: int) -> Float[Array, ""]:
        return jnp.zeros(())
