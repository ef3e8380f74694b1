"""Axis letters: calls in the tests are checked against the annotations of their functions."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from vmoe.nn.losses import cross_entropy


@pytest.mark.process
def test_a_call_whose_axes_differ_from_the_annotated_ones_fails() -> None:
    with pytest.raises(TypeCheckError, match="labels"):
        cross_entropy(jnp.zeros((2, 3)), jnp.zeros((2, 4)), "softmax")
