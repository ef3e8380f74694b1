"""Makes the inputs of models and losses from pixels and classes, and checks the inputs of models
and layers."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, UInt8

from vmoe.errors import UsageError, require

Pixels = (
    UInt8[np.ndarray, "*b h w 3"]
    | Float32[np.ndarray, "*b h w 3"]
    | UInt8[Array, "*b h w 3"]
    | Float32[Array, "*b h w 3"]
)
Images = Float32[np.ndarray, "*b h w 3"] | Float32[Array, "*b h w 3"]

HIGH = np.float32((2**16 + 2**8 + 1) / 2**24)  # the first 24 bits of 1 / 255
LOW = HIGH / np.float32(2**24)  # the next 24


@overload
def to_float(pixels: np.ndarray) -> np.ndarray: ...
@overload
def to_float(pixels: Array) -> Array: ...
def to_float(pixels: Pixels) -> Images:
    """Converts pixels in [0, 255] to float32 in [-1, 1]; a numpy array stays one.

    The result is (2 x - 255) / 255, rounded once. For uint8 pixels it is bitwise equal in numpy
    and in every XLA program, since both products below are exact. The plain formula is not: XLA
    may turn the division into a product and fuse that with the addition, without rounding between.
    """
    centered = pixels.astype(np.float32) * 2 - 255
    return centered * HIGH + centered * LOW


def label_vectors(
    labels: Int[Array, "b l"] | Int[np.ndarray, "b l"], num_classes: int, *, normalize: bool
) -> Float32[Array, "b y"]:
    """The target of the loss for each image: 1 at each of its classes, 0 elsewhere.

    Args:
        labels: classes in [0, y); -1 for none. A class counts once.
        normalize: divide by the number of classes of the image, so that the vector sums to 1 for
            the softmax loss. An image without labels keeps zeros.
    """
    vectors = jax.nn.one_hot(labels, num_classes).max(axis=1)
    return vectors / jnp.maximum(vectors.sum(axis=1, keepdims=True), 1) if normalize else vectors


@overload
def is_label(classes: np.ndarray, labels: np.ndarray) -> np.ndarray: ...
@overload
def is_label(classes: Array, labels: Array) -> Array: ...
def is_label(
    classes: Int[Array | np.ndarray, "*x b"], labels: Int[Array | np.ndarray, "b l"]
) -> Bool[Array | np.ndarray, "*x b"]:
    """Whether a class is one of the labels of its image, so that its prediction is correct.

    Args:
        classes: one or several classes for each image, each 0 or more.
        labels: classes; padded with -1.
    """
    return (classes[..., None] == labels).any(-1)


@overload
def has_label(labels: np.ndarray) -> np.ndarray: ...
@overload
def has_label(labels: Array) -> Array: ...
def has_label(labels: Int[Array | np.ndarray, "b l"]) -> Bool[Array | np.ndarray, "b"]:
    """Whether an image has a label; images without labels are left out of the accuracy.

    Args:
        labels: classes; padded with -1.
    """
    known: Any = labels >= 0
    return known.any(-1)


def check_labels(labels: Int[np.ndarray, "..."], num_classes: int) -> None:
    """Checks that the labels of each image are classes of the model."""
    if labels.ndim != 2:
        raise UsageError(
            f"labels of shape {labels.shape}: use (b, l), padded with -1 where images have fewer; "
            "labels[:, None] is one label for each image"
        )
    if labels.size and not -1 <= labels.min() <= labels.max() < num_classes:
        raise UsageError(
            f"labels from {labels.min()} to {labels.max()}: the model has classes 0 to "
            f"{num_classes - 1}, and -1 is for none"
        )


def check_images(images: Any) -> None:
    """Checks that the input of a model is one float array (b, h, w, 3)."""
    if not isinstance(images, jax.Array | np.ndarray):
        raise UsageError(
            f"images is a {type(images).__name__}: give one array, float (b, h, w, 3) in [-1, 1]; "
            "np.stack or np.asarray makes one"
        )
    remedy = ""
    if images.ndim == 3:
        remedy = "there is no batch axis: use images[None]"
    elif images.ndim == 4 and images.shape[-1] != 3 and images.shape[1] == 3:
        remedy = "the channels come last: use images.transpose(0, 2, 3, 1)"
    elif images.ndim != 4 or images.shape[-1] != 3:
        remedy = "use (b, h, w, 3)"
    elif not jnp.issubdtype(images.dtype, jnp.floating):
        remedy = "use float in [-1, 1]; vmoe.nn.inputs.to_float makes it from pixels"
    if remedy:
        raise UsageError(f"images of shape {images.shape} and dtype {images.dtype}: {remedy}")


def as_tokens(tokens: Any) -> Float[Array, "*b d"]:
    """Tokens as a JAX array; NumPy's float64 becomes float32 unless JAX has 64 bits enabled.

    Raises:
        UsageError: they are not one float array with an axis d.
    """
    give = "give one float array (..., d)"
    if not isinstance(tokens, jax.Array | np.ndarray):
        others = "; a layer takes further arrays as per_token={...}"
        several = isinstance(tokens, Mapping | list | tuple)
        raise UsageError(f"tokens is a {type(tokens).__name__}: {give}{others * several}")
    if not tokens.ndim or not jnp.issubdtype(tokens.dtype, jnp.floating):
        raise UsageError(f"tokens of shape {tokens.shape} and dtype {tokens.dtype}: {give}")
    return jnp.asarray(tokens)


def check_mask(name: str, mask: Any, axes: tuple[int, ...]) -> None:
    """Checks that a mask has a bool for each image, or for each token."""
    array = isinstance(mask, jax.Array | np.ndarray)
    require(array, f"{name} is a {type(mask).__name__}: give one bool array {axes}")
    if mask.shape != axes or mask.dtype != bool:
        raise UsageError(
            f"{name} of shape {mask.shape} and dtype {mask.dtype}: use {axes} and bool, False for "
            "what only pads"
        )


def check_per_token(per_token: Any, axes: tuple[int, ...]) -> None:
    """Checks that the inputs per token of an MoE layer have a row for each token."""
    named = isinstance(per_token, Mapping)
    require(named, f"per_token is a {type(per_token).__name__}: give a dict, arrays by name")
    for name, tree in per_token.items():
        for x in jax.tree.leaves(tree):
            arrays = isinstance(x, jax.Array | np.ndarray)
            require(arrays, f"per_token {name} has a {type(x).__name__}: give arrays")
            if x.shape[: len(axes)] != axes:
                raise UsageError(
                    f"per_token {name} of shape {x.shape}: use ({', '.join(map(str, axes))}, ...), "
                    "a row for each token"
                )


@contextlib.contextmanager
def taking(part: str, shape: tuple[int, ...]) -> Iterator[None]:
    """Turns an error of a module, which gets tokens of a shape, into a UsageError of one line."""
    try:
        yield
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"{part} cannot take tokens {shape}: {reason}") from error
