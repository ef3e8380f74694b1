"""Groups of images: as few and as even as possible, with padding at the end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmoe.routing.groups import group, ungroup


@pytest.mark.parametrize(
    ("b", "m", "expected"),
    [
        (8, 8, (1, 8)),
        (16, 8, (2, 8)),
        (13, 8, (2, 7)),
        (10, 4, (3, 4)),
        (1, 8, (1, 1)),
        (9, 1, (9, 1)),
    ],
)
def test_groups_are_as_few_and_as_even_as_possible(
    b: int, m: int, expected: tuple[int, int]
) -> None:
    tokens = np.arange(b * 3.0, dtype=np.float32).reshape(b, 3, 1)

    @jax.jit
    def there_and_back(tokens: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        groups, valid = group(tokens, jnp.ones(b, bool), m)
        return groups, valid, ungroup(groups, b, 3)

    groups, valid, back = map(np.asarray, there_and_back(tokens))
    g, per_group = expected
    assert groups.shape == (g, per_group * 3, 1)
    np.testing.assert_array_equal(valid.reshape(-1), np.arange(g * per_group * 3) < b * 3)
    np.testing.assert_array_equal(back, tokens)
