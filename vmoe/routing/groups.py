"""Groups of tokens, which compete for the same slots."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped


class Groups(NamedTuple):
    """How the tokens of b sequences, such as images, are laid out in groups.

    A group has several whole sequences, or an equal part of one. Padding fills the last group of a
    device, or the last part of each sequence.

    Attributes:
        b: number of sequences.
        n: number of tokens of a sequence.
        sequences: number of sequences in a group, padding included.
        parts: number of groups of a sequence; 1 if a group has whole ones.
        devices: number of devices, each with an equal share of the groups; all whole sequences of a
            group are on one device.
    """

    b: int
    n: int
    sequences: int = 1
    parts: int = 1
    devices: int = 1

    @classmethod
    def of(cls, b: int, n: int, size: int, devices: int = 1) -> "Groups":
        """Groups of at most ``size`` tokens, as few and as even as possible.

        A sequence is cut if it is longer, or if it is the only one for several devices.
        """
        shares = 1 if b % devices == 0 else devices
        if n > size or shares > 1:
            return cls(b, n, 1, shares * max(1, -(-n // (shares * size))), devices)
        return cls(b, n, group_sizes(b // devices, size // max(1, n))[1], 1, devices)

    @property
    def g(self) -> int:
        """The number of groups."""
        shares, sequences, _ = self._padded
        return shares * sequences * self.parts // self.sequences

    @property
    def s(self) -> int:
        """The number of tokens in a group, padding included."""
        return math.prod(self._padded) // self.g

    @property
    def positions(self) -> Int[Array, "g s"]:
        """The position of each token in its sequence, in [0, n)."""
        return _positions(self)

    @functools.partial(jax.jit, static_argnums=(0, 2), inline=True)
    def split(self, x: Shaped[Array, "b n *x"], padding: int = 0) -> Shaped[Array, "g s *x"]:
        """The rows of sequences by group, and ``padding`` for padding."""
        (shares, sequences, length), rest = self._padded, x.shape[2:]
        x = x.reshape(shares, self.b // shares, self.n, *rest)
        missing = (0, 0), (0, sequences - self.b // shares), (0, length - self.n)
        x = jnp.pad(x, (*missing, *[(0, 0)] * len(rest)), constant_values=padding)
        return x.reshape(self.g, self.s, *rest)

    @functools.partial(jax.jit, static_argnums=0, inline=True)
    def join(self, groups: Shaped[Array, "g s *x"]) -> Shaped[Array, "b n *x"]:
        """The rows of sequences, from their groups: the inverse of ``split``."""
        rest = groups.shape[2:]
        x = groups.reshape(*self._padded, *rest)[:, : self.b // self._padded[0], : self.n]
        return x.reshape(self.b, self.n, *rest)

    @property
    def _padded(self) -> tuple[int, int, int]:
        """The shares, the sequences of a share and the tokens of a sequence, padding included."""
        shares = self.devices if self.parts == 1 else 1
        groups = max(1, -(-self.b // (shares * self.sequences)))
        return shares, groups * self.sequences, max(1, -(-self.n // self.parts)) * self.parts


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _positions(groups: Groups) -> Int[Array, "g s"]:
    first = jnp.arange(groups.g, dtype=jnp.int32)[:, None] % groups.parts * groups.s
    last = max(0, groups.n - 1)
    return jnp.minimum(first + jnp.arange(groups.s, dtype=jnp.int32) % (last + 1), last)


def group_sizes(b: int, images_per_group: int) -> tuple[int, int]:
    """The number of groups for b images and the images in each, as even as possible.

    There are ceil(b / images_per_group) groups. If images_per_group divides b, each has exactly
    that many images, as in the paper. Without images there is one group of padding.

    >>> group_sizes(20, 8)
    (3, 7)
    """
    g = max(1, -(-b // images_per_group))
    return g, max(1, -(-b // g))


def by_image(groups: Shaped[Array, "g s *x"], b: int, devices: int = 1) -> Shaped[Array, "b n *x"]:
    """The tokens of b images, from groups of whole images.

    Args:
        devices: see ``Groups``.
    """
    g, s, *_ = groups.shape
    images = max(1, -(-b // g))
    return Groups(b, s // images, images, 1, devices).join(groups)
