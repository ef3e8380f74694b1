"""Axis letters: calls in the tests are checked against the annotations of their functions."""

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from tests.axes import MOST
from vmoe.nn.losses import cross_entropy


@pytest.mark.process
@pytest.mark.parametrize("test", [1, 2])
def test_a_call_whose_axes_differ_from_the_annotated_ones_fails_in_every_test(test: int) -> None:
    logits = jnp.zeros((2, 3))
    with pytest.raises(TypeCheckError, match="labels"):
        cross_entropy(logits, jnp.zeros((2, 4)), "softmax")
    for _ in range(MOST):
        cross_entropy(logits, logits, "softmax")
