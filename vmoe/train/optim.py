"""The optimiser, its learning rate, and the moving average of the parameters."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from vmoe.config import OptimConfig, WeightDecayConfig
from vmoe.nn.parts import part_of

Params = dict[str, Any]


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warmup from 0 to ``lr``, then decay to ``end_lr``, or constant.

    The first update (step 0) has the rate 0, or ``lr`` if there is no warmup. The rate is ``lr`` at
    step ``warmup_steps`` and would be ``end_lr`` at step ``steps``, so the last update, at step
    ``steps - 1``, has a rate just above it.
    """
    rest = steps - config.warmup_steps
    after = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, alpha=config.end_lr / config.lr),
        "linear": optax.linear_schedule(config.lr, config.end_lr, rest),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


def optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, Adam or momentum, decoupled weight decay, learning rate."""
    clip = config.grad_clip_norm
    return optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        optax.trace(config.momentum)
        if config.kind == "sgd"
        else optax.scale_by_adam(config.b1, config.b2),
        *(
            optax.add_decayed_weights(rate, mask=lambda params, kind=kind: _mask(params, kind))
            for kind, rate in _rates(config.weight_decay).items()
            if rate
        ),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def update_ema(ema: Params, params: Params, decay: float, step: Int[Array, ""]) -> Params:
    """One step of the moving average, whose decay is at most (1 + step) / (10 + step)."""
    rate = jnp.minimum(decay, (1.0 + step) / (10.0 + step))
    return cast(Params, optax.incremental_update(params, ema, 1.0 - rate))


def decay_kind(path: tuple[str, ...]) -> str:
    """The field of ``WeightDecayConfig`` that applies to a parameter.

    >>> decay_kind(("blocks", "1", "mlp", "experts", "up", "kernel"))
    'experts'
    """
    if path[-1] != "kernel":
        return "others"
    part = part_of(path)
    return part if part in ("experts", "routers", "head") else "kernels"


def _rates(decay: WeightDecayConfig) -> dict[str, float]:
    rates = {"experts": decay.experts, "routers": decay.routers, "head": decay.head}
    return {
        "kernels": decay.kernels,
        "others": decay.others,
        **{kind: decay.kernels if rate is None else rate for kind, rate in rates.items()},
    }


def _mask(params: optax.Params, kind: str) -> optax.Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decay_kind(tuple(str(key.key) for key in path)) == kind, params
    )
