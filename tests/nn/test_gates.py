"""Gates compute the logits of their papers; the oracles are NumPy in float64."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax
from scipy.stats import norm

from tests.random_models import outputs
from vmoe.config import (
    AuxLossWeights,
    CosineGate,
    LinearGate,
    MlpGate,
    MoEConfig,
    NoisyGate,
    Router,
    Soft,
    TokenChoice,
    replace,
)
from vmoe.config.gates import Gate, SlotGate
from vmoe.errors import UsageError
from vmoe.nn.gates import GATES, NoisyLogits
from vmoe.nn.moe import MoE

B, N, D, E = 3, 5, 6, 4
RNG = np.random.default_rng(0)
TOKENS = jnp.float32(RNG.normal(size=(B, N, D)))
CONFIG = MoEConfig(num_experts=E, router=TokenChoice(k=2, images_per_group=1))


def gate_of(gate: Gate, **router: Any) -> tuple[nnx.Module, dict[str, np.ndarray]]:
    """A gate whose parameters are all random, and these in float64."""
    config = replace(CONFIG, gate=gate, router=Soft()) if gate.kind == "slots" else CONFIG
    module = GATES[type(gate)](D, N, replace(config, gate=gate), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(1)
    state = nnx.state(module)
    nnx.update(module, jax.tree.map(lambda x: jnp.float32(rng.uniform(0.2, 1, x.shape)), state))
    return module, jax.tree.map(np.float64, nnx.to_pure_dict(nnx.state(module)))


def unit(x: np.ndarray, axis: int) -> np.ndarray:
    return x / np.linalg.norm(x, axis=axis, keepdims=True)


def expected(kind: str, p: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    match kind:
        case "linear" | "noisy":
            return x @ p["kernel"]
        case "cosine":
            return unit(x @ p["projection"], -1) @ unit(p["kernel"], 0) / p["temperature"]
        case "mlp":
            return np.tanh(x @ p["hidden"] + p["bias"]) @ p["kernel"]
        case "slots":
            return p["scale"] * np.einsum("gsd,dec->gsec", unit(x, -1), unit(p["kernel"], 0))
    raise ValueError(kind)


@pytest.mark.parametrize(
    "gate",
    [LinearGate(), NoisyGate(), CosineGate(dim=3), MlpGate(hidden_dim=7), SlotGate()],
    ids=lambda gate: gate.kind,
)
def test_each_gate_equals_its_formula(gate: Gate) -> None:
    module, params = gate_of(gate)
    logits, half = nnx.jit(lambda m, x: (m(x), m(x.astype(jnp.bfloat16))))(module, TOKENS)
    if gate.kind == "noisy":
        noise = np.log1p(np.exp(np.float64(TOKENS) @ params["noise"]))
        np.testing.assert_allclose(logits.noise_std, noise + 0.01, rtol=1e-5)
        logits = logits.logits
    assert logits.dtype == jnp.float32
    values = expected(gate.kind, params, np.float64(TOKENS))
    np.testing.assert_allclose(logits, values, rtol=1e-4, atol=1e-4)
    assert jax.tree.leaves(half)[0].dtype == jnp.float32


def test_the_sizes_of_gates_follow_from_their_configs() -> None:
    gates = {
        CosineGate(): {"projection": (D, E // 2), "kernel": (E // 2, E), "temperature": ()},
        MlpGate(): {"hidden": (D, D), "bias": (D,), "kernel": (D, E)},
    }
    for gate, shapes in gates.items():
        _, params = gate_of(gate)
        assert {name: x.shape for name, x in params.items()} == shapes
    module = GATES[CosineGate](
        D, N, replace(CONFIG, gate=CosineGate(temperature=0.2)), rngs=nnx.Rngs(0)
    )
    assert np.isclose(module.temperature[...], 0.2)
    module.temperature[...] = 1e-6  # a temperature that training made tiny, or negative
    assert np.abs(outputs(module, TOKENS)).max() <= 100.001


def layer_of(gate: Any, **router: Any) -> MoE:
    experts = [nnx.Linear(D, D, rngs=nnx.Rngs(i)) for i in range(E)]
    return MoE(experts, gate, replace(CONFIG.router, **router))


def test_a_noisy_gate_starts_with_equal_logits_and_the_same_noise_for_all() -> None:
    module = GATES[NoisyGate](D, N, replace(CONFIG, gate=NoisyGate()), rngs=nnx.Rngs(0))
    logits, noise_std = outputs(module, TOKENS)
    assert (np.asarray(logits) == 0).all()
    np.testing.assert_allclose(noise_std, np.log(2) + 0.01, rtol=1e-6)


def test_the_noise_of_the_noisy_gate_has_the_learned_standard_deviation_and_its_own_load_loss() -> (
    None
):
    """One token, many times; the loss is that of the last router inputs."""
    module, params = gate_of(NoisyGate())
    token = np.float64(TOKENS[0, 0])
    std = np.log1p(np.exp(token @ params["noise"])) + 0.01
    logits = token @ params["kernel"]
    layer = layer_of(module, aux_loss=AuxLossWeights(load=1.0, importance=0.0))
    seen = []

    def spy(inputs: Any, router: Router, c: int) -> Any:
        decision = router(inputs, c)
        jax.debug.callback(lambda *x: seen.append(x), inputs.noise, decision.losses["load"])
        return decision

    tokens = jnp.broadcast_to(TOKENS[0, 0], (1, 4000, D))
    run = nnx.jit(lambda m, x, key: m.route(x, jnp.ones(x.shape[:2], bool), key, spy))
    record = run(layer, tokens, jax.random.key(0))
    jax.effects_barrier()
    ((noise, loss),) = seen
    np.testing.assert_allclose(np.std(noise[0], axis=0), std, rtol=0.05)
    np.testing.assert_allclose(np.mean(noise[0], axis=0), 0, atol=4 * std.max() / 4000**0.5)
    threshold = np.sort(logits + np.float64(noise[0]), axis=-1)[:, -2:-1]  # the second largest
    load = (1 - norm.cdf((threshold - logits) / std)).mean(0)
    np.testing.assert_allclose(loss, [load.var() / load.mean() ** 2], rtol=1e-3)
    np.testing.assert_allclose(record.aux_loss, loss[0], rtol=1e-5)


def test_the_gradient_reaches_what_a_noisy_gate_learned_about_its_noise() -> None:
    layer = layer_of(gate_of(NoisyGate())[0], aux_loss=AuxLossWeights(load=1.0))

    @nnx.jit
    def gradient(layer: MoE, key: Any) -> Any:
        def loss(layer: MoE) -> jax.Array:
            y, record = layer.forward(TOKENS, key=key)
            return (y**2).sum() + record.aux_loss

        return nnx.state(nnx.grad(loss)(layer))  # a state, or in time a module

    training = gradient(layer, jax.random.key(0))
    evaluation = gradient(layer, None)
    assert (np.asarray(training["gate"]["noise"][...]) != 0).all()
    assert (np.asarray(evaluation["gate"]["noise"][...]) == 0).all()
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(training))


def test_statistics_and_random_streams_of_a_gate_change_under_nnx_jit() -> None:
    rngs = nnx.Rngs(0)
    parts = nnx.BatchNorm(D, rngs=rngs), nnx.Dropout(0.5, rngs=rngs), nnx.Linear(D, E, rngs=rngs)
    layer = layer_of(nnx.Sequential(*parts))
    first, second = (nnx.jit(MoE.forward)(layer, TOKENS)[1].logits for _ in range(2))
    mean, dropout, _ = layer.gate.layers
    expected = 0.01 * np.asarray(TOKENS).mean((0, 1)) * (1 + 0.99)
    np.testing.assert_allclose(mean.mean[...], expected, rtol=1e-5, atol=1e-6)
    assert dropout.rngs.count[...] == 2 and (np.asarray(first) != np.asarray(second)).any()


def test_any_linear_layer_or_own_module_is_a_gate() -> None:
    linear = nnx.Linear(D, E, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(5))
    record = nnx.jit(MoE.forward)(layer_of(linear), TOKENS)[1]
    expected = np.asarray(TOKENS) @ linear.kernel[...] + linear.bias[...]
    np.testing.assert_allclose(record.logits, expected, rtol=1e-5, atol=1e-6)

    class WithNoise(nnx.Module):
        def __init__(self, noise_std: float | jax.Array):
            self.noise_std = noise_std

        def __call__(self, tokens: jax.Array) -> NoisyLogits:
            return NoisyLogits(tokens[..., :E], self.noise_std)

    # The gate's noise replaces the router's, also in the load loss, as a number and as an array.
    records = [
        nnx.jit(MoE.forward)(
            layer_of(WithNoise(noise_std), noise_std=5.0), TOKENS, key=jax.random.key(0)
        )[1]
        for noise_std in (1e-4, jnp.full((*TOKENS.shape[:2], E), 1e-4))
    ]
    np.testing.assert_allclose(records[0].gates, softmax(TOKENS[..., :E], axis=-1), rtol=1e-2)
    np.testing.assert_allclose(*(record.losses["load"] for record in records), rtol=1e-6)


def test_a_gate_that_does_not_fit_the_router_is_refused() -> None:
    with pytest.raises(UsageError, match="gate.kind=slots.*leave the gate out"):
        replace(CONFIG, gate=SlotGate())
    with pytest.raises(UsageError, match="gate.kind=cosine.*leave the gate out"):
        MoEConfig(gate=CosineGate(), router=Soft())
