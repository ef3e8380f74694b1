"""Pixels and classes become the inputs of models and losses; wrong inputs are refused."""

import subprocess
import sys

import numpy as np
import pytest

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


WRONG = """
import warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np, vmoe, vmoe.errors
from flax import nnx
from vmoe.config import CosineGate, MlpGate, MoEConfig, NoisyGate, Soft
from vmoe.nn.moe import MoE, capture_records
model = vmoe.create_model("vit_test", depth=1)
image = np.zeros((32, 32, 3), "f4")
configs = [MoEConfig(2, gate=gate()) for gate in (NoisyGate, CosineGate, MlpGate)]
configs += [MoEConfig(2), MoEConfig(2, router=Soft())]
layers = [MoE.from_config(config, 8, 4, 9, rngs=nnx.Rngs(0)) for config in configs]
layer, x, valid = layers[-2], jnp.ones((2, 9, 8)), jnp.ones((2, 9), bool)
doors = [layer, lambda x: layer.route(x, valid), lambda x: capture_records(layer, x)]
doors += [layer.gate for layer in layers] + [lambda x: model.forward_head(x)]
def say(call, *args):
    try:
        print(jax.tree.leaves(call(*args))[0].shape)
    except vmoe.errors.UsageError as error:
        print(error)
"""
"""Each line of the output is a shape, or the message of a UsageError."""


def refusals(calls: str) -> list[str]:
    """What the calls print in a process of its own, since annotations are checked in this one."""
    result = subprocess.run([sys.executable, "-c", WRONG + calls], capture_output=True, text=True)
    assert not result.returncode, result.stderr
    return result.stdout.splitlines()


@pytest.mark.process
def test_wrong_images_are_refused_by_shape_and_dtype_with_a_remedy() -> None:
    lines = refusals("""
say(model, np.zeros((1, 32, 32, 3), "u1"))
say(model, np.zeros((1, 32, 32, 1), "f4"))
say(model, image)
say(model, [image, image])
say(model, np.zeros((1, 3, 32, 32), "f4"))
say(jax.jit(lambda x: model(x, train=True)), image[None])
say(lambda x: jax.eval_shape(lambda x: model(x, train=True, key=jax.random.key(0)), x), image[None])
say(model, np.float64(image[None]))
say(lambda: model(image[None], valid=np.ones(2, bool)))
say(lambda: model(image[None], valid=[True]))
""")
    expected = [
        "shape (1, 32, 32, 3) and dtype uint8: use float in [-1, 1]; vmoe.nn.inputs.to_float",
        "shape (1, 32, 32, 1) and dtype float32: use (b, h, w, 3)",
        "shape (32, 32, 3) and dtype float32: there is no batch axis: use images[None]",
        "images is a list: give one array, float (b, h, w, 3) in [-1, 1]; np.stack",
        "dtype float32: the channels come last: use images.transpose(0, 2, 3, 1)",
        "inside jax.jit: give key=jax.random.key(...)",
        "(1, 10)",
        "(1, 10)",
        "valid of shape (2,) and dtype bool: use (1,) and bool, False for what only pads",
        "valid is a list: give one bool array (1,)",
    ]
    assert len(lines) == len(expected)
    for line, part in zip(lines, expected, strict=True):
        assert part in line


@pytest.mark.process
def test_tokens_and_keys_of_another_type_are_refused_in_one_line_at_every_door() -> None:
    """Layers, ``route``, ``capture_records``, each gate and a model's head."""
    lines = refusals("""
for tokens in ([x], {"a": x}, None, x.astype(complex), x.astype(int)):
    for door in doors:
        say(door, tokens)
print("keys")
for key in (3, jax.random.split(jax.random.key(0)), nnx.Rngs(0)):
    say(lambda: layer(x, key=key))
    say(lambda: layer.route(x, valid, key))
    say(lambda: model(image[None], train=True, key=key))
print("others")
say(layer.route, x[0], valid[0])
say(layer.route, x, valid[0])
say(lambda: layer(x, per_token=[x]))
class Several(nnx.Linear):
    def __call__(self, x):
        return [super().__call__(x)]
say(MoE([Several(8, 8, rngs=nnx.Rngs(i)) for i in range(2)], nnx.Linear(8, 2, rngs=nnx.Rngs(0))), x)
say(lambda: layer(np.ones((2, 9, 8))))
say(lambda: layer(x, key=jax.random.PRNGKey(0)))
""")
    keys, others = lines.index("keys"), lines.index("others")
    give = "give one float array (..., d)"
    kinds = ["is a list", "is a dict", "is a NoneType"]
    kinds += [f"of shape (2, 9, 8) and dtype {dtype}" for dtype in ("complex64", "int32")]
    doors = keys // len(kinds)
    assert doors == 9
    for i, line in enumerate(lines[:keys]):
        assert line.startswith(f"tokens {kinds[i // doors]}: {give}")
    give = ": give one key, such as jax.random.key(0), in training, and None in evaluation"
    kinds = ["is a int", "has shape (2,)", "is a Rngs"]
    assert lines[keys + 1 : others] == [f"key {kind}{give}" for kind in kinds for _ in range(3)]
    assert lines[others + 1 :] == [
        "tokens of shape (9, 8): use (b, n, d)",
        "valid of shape (9,) and dtype bool: use (2, 9) and bool, False for what only pads",
        "per_token is a list: give a dict, arrays by name",
        "expert Several makes a list: return one array; join several along the last axis, and "
        "split the outputs of the layer",
        "(2, 9, 8)",
        "(2, 9, 8)",
    ]
