"""The arrays of a traced program: their shapes and dtypes."""

import jax
from jax.extend.core import Literal, Var


def array(value: Var | Literal) -> jax.core.ShapedArray:
    """The shape and dtype of an input or output of an operation.

    Raises:
        TypeError: it is not an array.
    """
    if not isinstance(value.aval, jax.core.ShapedArray):
        raise TypeError(f"{value} is not an array: {value.aval}")
    return value.aval
