"""Numerical agreement with the published models; the oracles are stored runs of the authors' code.

Small runs are in ``tests/golden``; ``--golden DIR`` reads another folder. With ``-s`` each test
prints its largest relative differences.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.conftest import OLD_GENERATOR
from tests.published import Golden, difference
from vmoe import models
from vmoe.axes import RouterInputs, Routing, SoftRouting
from vmoe.config import ExpertChoice, MoEConfig, TokenChoice, replace
from vmoe.routing import aux_losses, expert_choice, token_choice

# Logits and gradients are those of the program that users run, compiled as users do (see
# conftest.py).
OPTIONS: dict[str, int | bool] = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
if OLD_GENERATOR:
    OPTIONS["xla_cpu_use_fusion_emitters"] = True
compiled = functools.partial(jax.jit, compiler_options=OPTIONS)


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest) -> Golden:
    return Golden.opened(request.param, compiled)


def relative(ours: jax.Array, theirs: np.ndarray, what: str) -> float:
    found = difference(ours, theirs)
    print(f"  {what} {found:.1e}", end="")
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def decide(
    moe: MoEConfig, c: int, logits: jax.Array, gates: jax.Array | None
) -> Routing | SoftRouting:
    """Our routing, given the published gates (for soft routing, the published logits)."""
    valid = jnp.ones(logits.shape[:2], bool)
    match moe.router:
        case TokenChoice(k=k, priority=priority):
            return token_choice.assign(gates, valid, k=k, c=c, priority=priority)
        case ExpertChoice():
            return expert_choice.assign(gates, valid, c=c)
    return moe.router(RouterInputs(logits, None, valid, None), c).routing


def test_routing_decisions_equal_the_published_ones_given_their_gates(golden: Golden) -> None:
    for i, stored in golden.blocks:
        moe, (_, s, *_) = golden.config.moe_of(i), stored["router_logits"].shape
        c = moe.slots(s)
        routing = decide(moe, c, stored["router_logits"], stored.get("gates"))
        if "dispatch" in stored:
            assert c == stored["dispatch"].shape[-1]
            assert relative(routing.dispatch, stored["dispatch"], f"dispatch {i}") < 1e-6
            assert relative(routing.combine, stored["combine"], f"combine {i}") < 1e-6
        elif "slot" in stored:
            assert c == stored["capacity"]
            slots, weights = by_expert(routing)
            np.testing.assert_array_equal(slots, stored["slot"])
            np.testing.assert_array_equal(weights, stored["combine"])
        else:
            assert c == stored["capacity"]
            np.testing.assert_array_equal(routing.experts, stored["indices"][..., 0])
            np.testing.assert_array_equal(routing.kept, stored["kept"])
            positions = np.where(stored["kept"], stored["indices"][..., 1], 0)
            np.testing.assert_array_equal(np.where(routing.kept, routing.slots % c, 0), positions)
            theirs = np.where(stored["kept"], stored["combine_weights"], 0)
            np.testing.assert_array_equal(routing.weights, theirs)


def by_expert(routing: Routing) -> tuple[np.ndarray, np.ndarray]:
    """Slot positions, -1 where a token is not sent, and combine weights; both (g, s, e)."""
    (g, s, _), (_, e, c) = routing.slots.shape, routing.choices.shape
    slots, weights = np.full((g, s, e), -1), np.zeros((g, s, e), np.float32)
    group, token, rank = np.nonzero(routing.kept)
    at = group, token, np.asarray(routing.experts)[group, token, rank]
    slots[at] = np.asarray(routing.slots % c)[group, token, rank]
    weights[at] = np.asarray(routing.weights)[group, token, rank]
    return slots, weights


def test_embeddings_blocks_and_encodings_equal_the_published_ones(golden: Golden) -> None:
    model, stored = golden.model, golden.arrays

    @jax.jit
    def run(images: jax.Array) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        valid, outputs = jnp.ones(len(images), bool), [model.embed(images)]
        encoded, _ = model.encode(images)
        for block in model.blocks:
            outputs.append(block(outputs[-1], valid)[0])
        return model.patches(images), encoded, outputs[1:]

    embedding, encoded, outputs = run(jnp.asarray(stored["images"]))
    assert relative(embedding, stored["embedding"], "embedding") < 1e-5
    if golden.train:
        return
    assert relative(encoded, golden.float32("encoded"), "encoded") < 1e-5
    for i, tokens in enumerate(outputs):
        if (theirs := golden.float32(f"block/encoderblock_{i}")) is not None:
            assert relative(tokens, theirs, f"block {i}") < 1e-5


def test_logits_router_logits_and_gates_equal_the_published_ones(golden: Golden) -> None:
    _, (logits, records, _) = golden.results
    for i, stored in golden.blocks:
        theirs = golden.float32(f"moe/encoderblock_{i}/router_logits")
        assert relative(records[i].logits, theirs, f"router {i}") < 1e-5
        if "gates" in stored:
            assert relative(records[i].gates, stored["gates"], f"gates {i}") < 1e-5
    assert relative(logits, golden.float32("logits"), "logits") < 1e-5


def test_soft_logits_with_rows_in_bfloat16_equal_the_published_ones(golden: Golden) -> None:
    """The authors' Soft MoE rounds the tokens and the experts' outputs, not the mixtures.

    A value between two bfloat16 numbers may be rounded the other way; that changes one image.
    """
    if "f32/logits" in golden.arrays:
        config = replace(golden.config, moe=dict(exchange=dict(dtype="bfloat16")))
        params = models.params_of(golden.model)
        rounded = compiled(models.with_params(config, params))
        logits, theirs = rounded(jnp.asarray(golden.arrays["images"])), golden.arrays["logits"]
        images = [relative(*both, "image") for both in zip(logits, theirs, strict=True)]
        assert np.median(images) < 3e-5 and max(images) < 3e-4


def test_auxiliary_losses_of_every_group_equal_the_published_ones(golden: Golden) -> None:
    _, (_, records, _) = golden.results
    for i, record in records.items():
        stored = golden.below(f"metrics/encoderblock_{i}/")
        losses = record.losses | {"gshard": aux_losses.gshard(record.gates, record.valid)}
        for name in ("importance", "load", "gshard"):
            assert (name in losses) or f"{name}_loss" not in stored
            if f"{name}_loss" in stored:
                assert relative(losses[name], stored[f"{name}_loss"], f"{name} {i}") < 1e-5
        ours = float(record.aux_loss)
        assert ours == pytest.approx(float(np.mean(stored["auxiliary_loss"])), rel=1e-5)


def test_losses_and_gradients_equal_the_published_ones(golden: Golden) -> None:
    ours, (_, _, losses) = golden.results
    for name, loss in losses.items():
        stored = float(golden.float32(f"loss/{name}"))
        assert float(loss) == pytest.approx(stored, rel=1e-5), name
    gradients = golden.below("f32/grad/") or golden.below("grad/")
    assert gradients.keys() == (ours.keys() if golden.has_gradients else set())
    worst = 0.0
    for name, theirs in gradients.items():
        if not name.endswith("SelfAttention/key/bias"):  # its true gradient is 0
            worst = np.maximum(worst, difference(ours[name], theirs))  # NaN if one is
    print(f"  gradients {worst:.1e}", end="")
    assert worst < (2e-5 if "soft" in golden.name else 1e-4)  # 1.1e-5 with jax 0.10.1
