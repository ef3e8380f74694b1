"""The optimizer, its learning rate, and the averages of parameters: over time, and of experts."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from vmoe.config import OptimConfig, TrainConfig, WeightDecayConfig
from vmoe.train.lr_factors import (
    Params,
    has_lr_factors,
    lr_kind,
    scale_by_lr_factors,
    trained_params,
)
from vmoe.trees import merged


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Linear warmup from 0 to ``lr``, then the schedule of the config; see ``OptimConfig``.

    The first update (step 0) has the rate 0, or ``lr`` if there is no warmup. The rate is ``lr`` at
    step ``warmup_steps``. At step ``steps`` it would be ``end_lr``, or 0 after a cooldown, so the
    last update, at step ``steps - 1``, has a rate just above it.
    """
    rest = steps - config.warmup_steps
    after = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, alpha=config.end_lr / config.lr),
        "linear": optax.linear_schedule(config.lr, config.end_lr, rest),
        "polynomial": optax.polynomial_schedule(config.lr, config.end_lr, config.power, rest),
        "constant": optax.constant_schedule(config.lr),
        "rsqrt": lambda step: config.lr / jnp.sqrt(1 + step / config.timescale),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup_steps)
    if not config.cooldown_steps:
        return optax.join_schedules([warmup, after], [config.warmup_steps])
    start = steps - config.cooldown_steps
    cooldown = optax.linear_schedule(after(start - config.warmup_steps), 0.0, config.cooldown_steps)
    return optax.join_schedules([warmup, after, cooldown], [config.warmup_steps, start])


def optimizer(run: TrainConfig) -> optax.GradientTransformation:
    """Clipping by global norm, scaling, weight decay, learning rates, expert averaging.

    Only the trained parameters are updated (``trained_params``): frozen ones have no state and do
    not count in the global norm, as in big_vision.
    """
    config = run.optim
    clip = config.grad_clip_norm
    scaled = [scale_by_lr_factors(config, run.model.depth)] if has_lr_factors(config) else []
    averaged = [expert_weight_averaging(config.expert_averaging)] if config.expert_averaging else []
    chain = optax.chain(
        optax.identity() if clip is None else optax.clip_by_global_norm(clip),
        _scaling(config),
        *(
            optax.add_decayed_weights(rate, mask=lambda params, kind=kind: _mask(params, kind))
            for kind, rate in _rates(config.weight_decay).items()
            if rate
        ),
        optax.scale_by_learning_rate(schedule(config, run.total_steps)),
        *scaled,
        *averaged,
    )
    return chain._replace(update=jax.named_scope("optimizer")(chain.update))


def _scaling(config: OptimConfig) -> optax.GradientTransformation:
    """The transformation of clipped gradients before weight decay and learning rate."""
    dtype, b2 = config.momentum_dtype, config.b2
    if b2 is None:
        b2 = 0.99 if config.kind == "lion" else 0.999
    match config.kind:
        case "adamw":
            return optax.scale_by_adam(config.b1, b2, mu_dtype=dtype)
        case "lion":
            return optax.scale_by_lion(config.b1, b2, mu_dtype=dtype)
        case "sgd":
            return optax.trace(config.momentum, accumulator_dtype=dtype)
        case "adafactor":
            return optax.chain(
                optax.scale_by_factored_rms(
                    min_dim_size_to_factor=config.min_dim_size_to_factor,
                    decay_rate_fn=lambda step, power: jnp.minimum(
                        b2, 1 - 1 / (step + 1.0) ** power
                    ),
                ),
                optax.ema(config.momentum, debias=False, accumulator_dtype=dtype),
            )


def expert_weight_averaging(share: float) -> optax.GradientTransformation:
    """Moves each expert towards the mean of the others of its block, after its update.

    An updated expert w becomes (1 - share) w + share m, with m the mean of the other updated
    experts; a single expert stays.

    Source: "Experts Weights Averaging" (arXiv 2308.06093), which applies it after every step. There
    a random uniform partition assigns tokens to experts, here the router does.
    """

    def average(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> jax.Array:
        if lr_kind(tuple(key.key for key in path)) != "experts" or len(param) == 1:
            return update
        updated = param + update
        others = (updated.sum(0, keepdims=True) - updated) / (len(param) - 1)
        return (1 - share) * update + share * (others - param)

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(average, updates, params))


@jax.named_scope("ema")
def update_ema(run: TrainConfig, ema: Params, trained: Params, step: Int[Array, ""]) -> Params:
    """One step of the moving average, whose decay is at most (1 + step) / (10 + step).

    Frozen parameters keep their values, which averaging would round.
    """
    rate = jnp.minimum(run.ema_decay, (1.0 + step) / (10.0 + step))
    average = optax.incremental_update(trained, trained_params(run.optim, ema), 1.0 - rate)
    return merged(ema, cast(Params, average))


def decay_kind(path: tuple[str, ...]) -> str:
    """The field of ``WeightDecayConfig`` that applies to a parameter.

    >>> decay_kind(("blocks", "1", "mlp", "experts", "up", "kernel"))
    'experts'
    """
    if path[-1] != "kernel":
        return "others"
    kind = lr_kind(path)
    return "kernels" if kind == "others" else kind


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
