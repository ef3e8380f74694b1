"""Layouts of parameters in ViT files of timm and Hugging Face, which use PyTorch.

A linear layer's weight is (out, in) there and (in, out) here; attention heads are an axis of their
own here.
"""

import re
from collections.abc import Callable, Mapping

import numpy as np
from einops import EinopsError, rearrange

from vmoe.checkpoints.family import Rename, Transform
from vmoe.errors import UsageError

UNUSED = ("mask_token", "position_ids")  # used in pre-training only
PARAM = r"(weight|bias)"
QKV_BIASES = ("/query/bias", "/key/bias", "/value/bias")  # ends of paths

Layout = Callable[[re.Match[str], int], dict[str, Transform]]
"""From the match of a name, and the number of attention heads, to the parameters in the array. The
last group of the match is "weight" or "bias", unless the layout is ``same``."""


def linear(path: str) -> Layout:
    """A linear layer at a path."""
    return _layer(path, "kernel", "y x -> x y")


def half(path: str, i: int) -> Layout:
    """The first (0) or the second (1) half of the outputs of a linear layer; see ``Rename``."""
    whole = linear(path)
    return lambda found, heads: {f"{p}/{i}": make for p, make in whole(found, heads).items()}


def norm(path: str) -> Layout:
    """A layer norm."""
    return _layer(path, "scale", "d -> d", bias_axes="d -> d")


def patches(path: str) -> Layout:
    """The patch embedding."""
    return _layer(path, "kernel", "d c p q -> p q c d")


def output(path: str) -> Layout:
    """The layer after the heads."""
    return _layer(f"{path}/out", "kernel", "d (a z) -> a z d")


def _layer(path: str, weight: str, axes: str, bias_axes: str = "... -> ...") -> Layout:
    def layout(found: re.Match[str], heads: int) -> dict[str, Transform]:
        is_weight = found[found.re.groups] == "weight"
        name = weight if is_weight else "bias"
        return {f"{found.expand(path)}/{name}": rearranged(axes if is_weight else bias_axes, heads)}

    return layout


def inputs(path: str, *names: str) -> Layout:
    """The layers that make queries, keys or values, concatenated along the outputs."""

    def layout(found: re.Match[str], heads: int) -> dict[str, Transform]:
        weight = found[found.re.groups] == "weight"
        axes = "(t a z) d -> t d a z" if weight else "(t a z) -> t a z"
        parts = rearranged(axes, heads, t=len(names))
        return {
            f"{found.expand(path)}/{name}/{'kernel' if weight else 'bias'}": (
                lambda array, i=i: parts(array)[i]
            )
            for i, name in enumerate(names)
        }

    return layout


def same(path: str) -> Layout:
    """An array with the same layout."""
    return lambda found, heads: {found.expand(path): np.asarray}


def rearranged(axes: str, heads: int, **sizes: int) -> Transform:
    """An array with other axes; of a shape that they do not fit, a ValueError."""
    if "a z)" in axes:
        sizes["a"] = heads

    def transform(array: np.ndarray) -> np.ndarray:
        try:
            return rearrange(array, axes, **sizes)
        except EinopsError:
            raise ValueError(f"it does not fit its layer, or {heads} heads") from None

    return transform


def renaming(rules: Mapping[str, Layout], heads: int) -> Rename:
    """A function from the arrays of a file to our parameters.

    Args:
        rules: layouts by pattern; a pattern must match all of a name.
    """
    if heads < 1:
        raise UsageError(f"{heads} attention heads: a model has at least one")

    def rename(name: str, shape: tuple[int, ...]) -> Mapping[str, Transform]:
        last = name.rpartition(".")[2]
        if last in UNUSED or (last == "register_tokens" and 0 in shape):  # a model without any
            return {}
        for pattern, layout in rules.items():
            if found := re.fullmatch(pattern, name):
                return layout(found, heads)
        raise KeyError(name)

    return rename
