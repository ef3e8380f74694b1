"""Pixels and classes become the inputs of models and losses."""

import numpy as np

OPTIMIZED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
"""Compiler options that restore what the tests turn off (see conftest.py)."""


PIXELS = np.arange(256, dtype=np.uint8).reshape(16, 16, 1, 1).repeat(3, axis=3)


def test_floats_are_the_same_bits_in_numpy_and_in_every_program() -> None:
    """Also if XLA fuses the conversion with later operations."""
    import jax
    import jax.numpy as jnp

    from vmoe.nn.inputs import to_float

    expected = to_float(PIXELS)
    assert isinstance(expected, np.ndarray) and expected.dtype == np.float32
    np.testing.assert_array_equal(to_float(jnp.asarray(PIXELS)), expected)
    for followed_by in (lambda x: x, lambda x: x + np.float32(0.3), lambda x: x * np.float32(0.3)):
        program = jax.jit(lambda x, f=followed_by: f(to_float(x)), compiler_options=OPTIMIZED)
        np.testing.assert_array_equal(program(PIXELS), followed_by(expected))


def test_floats_are_the_rounded_quotients_from_minus_one_to_one() -> None:
    """The authors' ``value_range(-1, 1)`` rounds more often."""
    from vmoe.nn.inputs import to_float

    exact = (2 * PIXELS.astype(np.float64) - 255) / 255
    np.testing.assert_array_equal(to_float(PIXELS), exact.astype(np.float32))
    authors = PIXELS.astype(np.float32) / np.float32(255) * np.float32(2) - np.float32(1)
    np.testing.assert_allclose(to_float(PIXELS), authors, rtol=0, atol=6e-8)
    between = np.linspace(0, 255, 3000, dtype=np.float32).reshape(10, 100, 1, 3)
    np.testing.assert_allclose(to_float(between), (2 * between - 255) / 255, rtol=0, atol=1.2e-7)


def test_label_vectors_have_one_at_each_class_or_sum_to_one() -> None:
    from vmoe.nn.inputs import label_vectors

    labels = np.array([[2, -1, -1], [0, 3, -1], [1, 2, 3], [1, 1, -1], [-1, -1, -1]], np.int32)
    ones = [[0, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_array_equal(label_vectors(labels, 4, normalize=False), ones)
    shares = np.array(ones) / [[1], [2], [3], [1], [1]]
    vectors = label_vectors(labels, 4, normalize=True)
    np.testing.assert_allclose(vectors, shares, rtol=1e-7)
    assert vectors.dtype == np.float32


def test_single_labels_become_one_hot_vectors() -> None:
    import jax

    from vmoe.nn.inputs import label_vectors

    labels = np.array([[4], [0], [2]], np.int32)
    for normalize in (True, False):
        vectors = label_vectors(labels, 5, normalize=normalize)
        np.testing.assert_array_equal(vectors, jax.nn.one_hot(labels[:, 0], 5))
