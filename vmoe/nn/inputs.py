"""Checks of a model's input."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vmoe.errors import UsageError


def check_images(images: Any) -> None:
    """Checks that the input of a model is one float array (b, h, w, 3).

    Raises:
        UsageError: it is not; names its type or its shape and dtype, and the remedy.
    """
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
        remedy = "use float in [-1, 1]; vmoe.data.crops.to_float makes it from pixels"
    if remedy:
        raise UsageError(f"images of shape {images.shape} and dtype {images.dtype}: {remedy}")
