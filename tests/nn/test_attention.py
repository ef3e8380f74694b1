"""Parts of the attention; the oracles are loops and einsums of NumPy in float64."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from vmoe.config import GoldenRotary
from vmoe.nn.attention import Attention
from vmoe.nn.positions import rotate, rotation

SIGLINO = Path(__file__).parents[1] / "golden/weights/siglino_moe/model.safetensors"
B, N, D, HEADS, Z = 2, 5, 12, 2, 8
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("masked", [False, True])
def test_a_sink_gates_each_head_by_the_logits_of_the_tokens_that_it_sees(masked: bool) -> None:
    """A head's outputs are multiplied by sigmoid(log(sum(exp(logits))) - sink)."""
    layer = Attention(
        D, HEADS, head_dim=Z, qk_rms=True, sink=True, dtype=jnp.float32, rngs=nnx.Rngs(0)
    )
    layer.sink[...] = jnp.array([-1.0, 2.0])
    tokens = jnp.asarray(RNG.normal(size=(B, N, D)), jnp.float32)
    seen = np.arange(N) < (N - 2 if masked else N)
    params = {name: np.float64(getattr(layer, name).kernel[...]) for name in ("query", "key")}
    query, key = (np.einsum("bnd,daz->bnaz", tokens, kernel) for kernel in params.values())
    query, key = (x / np.sqrt((x**2).mean(-1, keepdims=True)) for x in (query, key))
    exps = np.exp(np.einsum("bqaz,bnaz->baqn", query, key) / np.sqrt(Z)) * seen
    sums = exps.sum(axis=-1, keepdims=True)
    gates = 1 / (1 + np.exp([[[-1.0]], [[2.0]]] - np.log(sums)))
    mixed = np.einsum("baqn,bnaz->bqaz", exps / sums * gates, layer.value(tokens))
    mask = jnp.broadcast_to(jnp.asarray(seen), (B, 1, N, N)) if masked else None
    np.testing.assert_allclose(layer(tokens, mask=mask), layer.out(mixed), atol=1e-6)
    if not masked:
        np.testing.assert_allclose(layer.weights(tokens), exps / sums * gates, atol=1e-6)


def test_golden_angles_are_positions_times_the_frequencies_that_siglino_stores() -> None:
    waves = load_file(SIGLINO)["freqs_cis_golden"]  # a, z / 4, 2
    (a, quarter, _), (i, j) = waves.shape, (2, 3)
    golden = GoldenRotary()
    heads = RNG.normal(size=(1, 3 + i * j, a, 4 * quarter)).astype(np.float32)
    rotated = rotate(jnp.asarray(heads), rotation(golden, i, j, a, 4 * quarter, 3), golden)
    expected = np.float64(heads)
    for token in range(i * j):
        row, column = divmod(token, j)
        place = (
            np.sqrt(i / j) * (2 * row / (i - 1) - 1),
            np.sqrt(j / i) * (2 * column / (j - 1) - 1),
        )
        for head in range(a):
            for k in range(quarter):
                pair = slice(2 * (quarter + k), 2 * (quarter + k) + 2)
                turned = complex(*heads[0, 3 + token, head, pair]) * np.exp(
                    1j * (waves[head, k] @ place)
                )
                expected[0, 3 + token, head, pair] = turned.real, turned.imag
    np.testing.assert_allclose(rotated, expected, atol=5e-6)
