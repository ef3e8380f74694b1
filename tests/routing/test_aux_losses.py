"""Auxiliary losses compared with their formulas in NumPy, and in numerically hard cases."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx

from vmoe.axes import Decision, Record, RouterInputs
from vmoe.config import AuxLossWeights, MoEConfig, Router, TokenChoice
from vmoe.nn.moe import MoE
from vmoe.routing import aux_losses, token_choice

G, S, E, K = 3, 10, 4, 2


@pytest.fixture
def logits() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(G, S, E)).astype(np.float32)


@pytest.fixture
def valid() -> np.ndarray:
    return np.arange(S) < np.array([[S], [6], [1]])


def losses_by(router: TokenChoice) -> Callable[..., dict[str, jax.Array]]:
    return jax.jit(functools.partial(losses_of, router))


def losses_of(
    router: TokenChoice,
    logits: jax.Array,
    noisy: jax.Array | None,
    gates: jax.Array,
    valid: jax.Array,
) -> dict[str, jax.Array]:
    inputs = RouterInputs(logits, None if noisy is None else noisy - logits, valid, draw=None)
    routing = token_choice.assign(inputs.logits, inputs.valid, k=router.k, c=1)
    return router.decision(inputs, inputs.noisy_logits, gates, routing).losses


def every_loss(over: aux_losses.Over, z: float = 1.0) -> AuxLossWeights:
    return AuxLossWeights(1.0, 1.0, 1.0, z, over=over)


def squared_coefficient_of_variation(x: np.ndarray) -> float:
    return x.var() / x.mean() ** 2


def test_losses_equal_their_formulas_and_ignore_padding(
    logits: np.ndarray, valid: np.ndarray
) -> None:
    noisy = logits + np.float32(0.1) * logits[::-1, ::-1, ::-1]
    gates = scipy.special.softmax(noisy, axis=-1)
    router = TokenChoice(k=K, noise_std=0.5, aux_loss=AuxLossWeights(1.0, 1.0, 1.0, 1.0))
    losses = jax.device_get(losses_by(router)(logits, noisy, gates, valid))
    for g in range(G):
        x, y, p = (np.asarray(a, np.float64)[g][valid[g]] for a in (logits, noisy, gates))
        clean = scipy.special.softmax(x, axis=1)
        threshold = -np.sort(-y, axis=1)[:, K - 1 : K]
        load = 1 - scipy.stats.norm.cdf((threshold - x) * E / 0.5)
        first = np.eye(E)[p.argmax(1)]
        expected = {
            "importance": squared_coefficient_of_variation(clean.sum(0)),
            "load": squared_coefficient_of_variation(load.mean(0)),
            "gshard": E**2 * (first.mean(0) * p.mean(0)).mean(),
            "z": (scipy.special.logsumexp(x, axis=1) ** 2).mean(),
        }
        assert losses.keys() == expected.keys()
        for name, value in expected.items():
            assert float(losses[name][g]) == pytest.approx(value, rel=1e-5), name


def test_losses_with_shares_equal_their_formulas_and_are_smallest_at_these_shares(
    logits: np.ndarray,
) -> None:
    """gshard is that of MoE++ (equation 7): tau for the last expert, which computes nothing."""
    tau = 0.25
    weights = AuxLossWeights(1.0, 1.0, 1.0)
    router = TokenChoice(k=1, aux_loss=weights, shares=(tau, tau, tau, 1.0))
    valid, gates = jnp.ones((G, S), bool), scipy.special.softmax(logits, axis=-1)
    losses = jax.device_get(losses_by(router)(logits, logits, gates, valid))
    for g in range(G):
        x, p = np.float64(logits[g]), np.float64(gates[g])
        first, eta = np.eye(E)[p.argmax(1)].mean(0), np.array([1, 1, 1, tau])
        chances = 1 - scipy.stats.norm.cdf((x.max(1, keepdims=True) - x) * E)
        expected = {
            "importance": squared_coefficient_of_variation(p.sum(0) / router.shares),
            "load": squared_coefficient_of_variation(chances.sum(0) / router.shares),
            "gshard": E * (eta * first * p.mean(0)).sum(),
        }
        for name, value in expected.items():
            assert float(losses[name][g]) == pytest.approx(value, rel=1e-4), name
    ideal = np.array(router.shares) / sum(router.shares)
    even = jnp.broadcast_to(jnp.float32(ideal), (1, S, E))
    assert float(aux_losses.importance(even, valid[:1], router.shares)[0]) < 1e-10
    assert float(aux_losses.importance(even, valid[:1])[0]) > 0.1


def test_a_loss_of_ones_own_may_have_any_name() -> None:
    losses = {"over": jnp.full(2, 3.0), "section": jnp.full(2, 4.0)}
    total = aux_losses.total(losses, AuxLossWeights(), jnp.ones((2, 3), bool))
    assert float(total) == 7


def test_the_total_is_weighted_and_averaged_over_groups_with_real_tokens(
    logits: np.ndarray,
) -> None:
    weights = AuxLossWeights(importance=0.5, load=0.0, gshard=0.25)
    router = TokenChoice(k=K, aux_loss=weights)
    valid = np.arange(G)[:, None] != np.ones((1, S))
    gates = scipy.special.softmax(logits, axis=-1)
    losses = jax.device_get(losses_by(router)(logits, None, gates, valid))
    per_group = 0.5 * losses["importance"] + 0.25 * losses["gshard"]
    expected = (per_group[0] + per_group[2]) / 2
    total = jax.jit(lambda losses, valid: aux_losses.total(losses, weights, valid))
    assert float(total(losses, valid)) == pytest.approx(float(expected), rel=1e-6)


def test_a_loss_of_weight_0_is_not_computed_and_load_needs_noise(
    logits: np.ndarray, valid: np.ndarray
) -> None:
    quiet, gates = TokenChoice(aux_loss=AuxLossWeights(0.0, 0.0)), logits
    assert jax.eval_shape(losses_by(quiet), logits, logits, gates, valid) == {}
    computed = jax.eval_shape(losses_by(TokenChoice()), logits, None, gates, valid)
    assert computed.keys() == {"importance"}


def test_gradients_are_finite_for_equal_gates_and_for_a_group_of_padding() -> None:
    zeros = np.zeros((2, S, E), np.float32)
    valid = jnp.asarray(np.arange(2)[:, None] != np.ones((1, S)))
    router = TokenChoice(aux_loss=AuxLossWeights(1.0, 1.0, 1.0, 1.0))

    def total(logits: jax.Array) -> jax.Array:
        noise = 0.1 * jax.random.normal(jax.random.key(0), logits.shape)
        gates = jax.nn.softmax(logits + noise)
        losses = losses_of(router, logits, logits + noise, gates, valid)
        return aux_losses.total(losses, router.aux_loss, valid)

    value, gradient = jax.jit(jax.value_and_grad(total))(zeros)
    assert np.isfinite(value) and np.isfinite(gradient).all()


def test_gshard_is_1_for_equal_loads_and_e_if_one_expert_gets_every_token() -> None:
    one_each = np.eye(E, dtype=np.float32)
    even = 0.9 * one_each[None] + 0.1 / E
    collapsed = np.tile(one_each[0], (1, E, 1))
    gshard, valid = jax.jit(aux_losses.gshard), np.ones((1, E), bool)
    assert float(gshard(even, valid)[0]) == pytest.approx(1.0)
    assert float(gshard(collapsed, valid)[0]) == pytest.approx(E)


def test_losses_over_the_batch_equal_their_formulas_for_the_tokens_of_all_groups(
    logits: np.ndarray, valid: np.ndarray
) -> None:
    noise = np.float32(0.1) * logits[::-1, ::-1, ::-1]
    router = TokenChoice(k=K, noise_std=0.5, aux_loss=every_loss("batch"))
    inputs = RouterInputs(logits, noise, valid, draw=None)
    gates = scipy.special.softmax(logits + noise, axis=-1)

    @jax.jit
    def losses(inputs: RouterInputs, gates: jax.Array) -> dict[str, jax.Array]:
        routing = token_choice.assign(gates, inputs.valid, k=K, c=1)
        decision = router.decision(inputs, inputs.noisy_logits, gates, routing)
        assert decision.losses.keys() == {"z"}  # a mean over tokens
        sums = decision.sums | {"tokens": inputs.valid.sum(1)}
        return router.losses_of_sums(jax.tree.map(lambda x: x.sum(0), sums))

    ours = losses(inputs, gates)
    x, y, p = (np.float64(a)[valid] for a in (logits, logits + noise, gates))
    threshold = -np.sort(-y, axis=1)[:, K - 1 : K]
    chances = 1 - scipy.stats.norm.cdf((threshold - x) * E / 0.5)
    first = np.eye(E)[p.argmax(1)]
    clean = scipy.special.softmax(x, axis=1)
    expected = {
        "importance": squared_coefficient_of_variation(clean.sum(0)),
        "load": squared_coefficient_of_variation(chances.sum(0)),
        "gshard": E**2 * (first.mean(0) * p.mean(0)).mean(),
    }
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert float(ours[name]) == pytest.approx(value, rel=1e-5), name


@pytest.mark.long_after(1)
@pytest.mark.parametrize("over", ["device", "batch"])
def test_losses_over_the_batch_and_their_gradients_are_those_of_one_group_of_all_tokens(
    over: aux_losses.Over,
) -> None:
    """The last image of five pads the last group of two, and another one pads the batch."""
    images = 40 * jax.random.normal(jax.random.key(1), (5, 4, 6))
    mask = jnp.broadcast_to(jnp.arange(5)[:, None] < 4, (5, 4))

    def aux_loss(moe: MoE, images: jax.Array) -> tuple[jax.Array, Record]:
        _, record = moe.forward(images, mask=mask)
        return record.aux_loss, record

    def layer(over: aux_losses.Over, images_per_group: int) -> MoE:
        loss = every_loss(over, z=0.0)
        router = TokenChoice(k=K, aux_loss=loss, images_per_group=images_per_group)
        config = MoEConfig(num_experts=E, router=router)
        return MoE.from_config(config, 6, 8, 4, rngs=nnx.Rngs(0))

    gradient = nnx.jit(nnx.value_and_grad(aux_loss, argnums=(0, 1), has_aux=True))
    (loss, record), gradients = gradient(layer(over, 2), images)
    (expected, _), whole = gradient(layer("group", 5), images)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    for x in record.losses.values():
        assert x.shape == (3,) and (x == x[0]).all()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, gradients, whole)
    assert float(jnp.abs(gradients[1]).max()) > 1e-4
    (separate, _), _ = gradient(layer("group", 2), images)
    assert abs(float(separate) - float(loss)) > 1e-3


def test_a_users_router_makes_a_loss_of_its_own_sums_over_the_batch() -> None:
    layer = MoE([nnx.Linear(6, 6, rngs=nnx.Rngs(i)) for i in range(3)], Logits(), MeanLargest())
    tokens = jax.random.normal(jax.random.key(1), (20, 5, 6))  # three groups
    _, record = nnx.jit(MoE.forward)(layer, tokens)
    gates = scipy.special.softmax(np.float64(tokens)[..., :3], -1)
    choices = np.bincount(gates.argmax(-1).reshape(-1), minlength=3)
    expected = gates.max(-1).mean() ** 2 + choices.max() / 100
    assert float(record.aux_loss) == pytest.approx(expected, rel=1e-5)


class Logits(nnx.Module):
    """A gate whose logits are the first values of a token."""

    def __call__(self, tokens: jax.Array) -> jax.Array:
        return tokens[..., :3]


@dataclasses.dataclass(frozen=True)
class MeanLargest(Router):
    """Switch, whose loss is the squared mean largest gate plus the largest load."""

    losses_over = "batch"

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        gates = jax.nn.softmax(inputs.logits)
        routing = token_choice.assign(gates, inputs.valid, k=1, c=c)
        largest = jnp.where(inputs.valid, gates.max(-1), 0).sum(-1)
        return Decision(gates, routing, sums={"largest": largest})

    def losses_of_sums(self, sums: dict[str, jax.Array]) -> dict[str, jax.Array]:
        mean, load = (x / sums["tokens"] for x in (sums["largest"], sums["choices"].max()))
        return {"own": mean**2 + load}
