"""The optimiser and its learning rate."""

import jax
import optax

from vmoe.analysis.parts import part_of
from vmoe.config import Decay, Optim


def schedule(config: Optim, steps: int) -> optax.Schedule:
    """Linear from 0 to the peak over the warmup, then to ``final_lr`` of it, or at the peak."""
    rest = steps - config.warmup
    after = {
        "cosine": optax.cosine_decay_schedule(config.lr, rest, alpha=config.final_lr),
        "linear": optax.linear_schedule(config.lr, config.lr * config.final_lr, rest),
        "constant": optax.constant_schedule(config.lr),
    }[config.schedule]
    warmup = optax.linear_schedule(0.0, config.lr, config.warmup)
    return optax.join_schedules([warmup, after], [config.warmup])


def optimizer(config: Optim, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam or momentum, decoupled decay, learning rate."""
    return optax.chain(
        optax.identity() if config.clip is None else optax.clip_by_global_norm(config.clip),
        optax.trace(config.momentum)
        if config.kind == "sgd"
        else optax.scale_by_adam(config.b1, config.b2),
        *(
            optax.add_decayed_weights(rate, mask=lambda params, kind=kind: _masked(params, kind))
            for kind, rate in _rates(config.decay).items()
            if rate
        ),
        optax.scale_by_learning_rate(schedule(config, steps)),
    )


def _rates(decay: Decay) -> dict[str, float]:
    own = {"experts": decay.experts, "routers": decay.routers, "head": decay.head}
    return {
        "kernels": decay.kernels,
        "others": decay.others,
        **{kind: decay.kernels if rate is None else rate for kind, rate in own.items()},
    }


def decay_kind(path: tuple[str, ...]) -> str:
    """The field of ``Decay`` that holds for a parameter.

    >>> decay_kind(("blocks", "1", "mlp", "experts", "up", "kernel"))
    'experts'
    """
    if path[-1] != "kernel":
        return "others"
    part = part_of(path)
    return part if part in ("experts", "routers", "head") else "kernels"


def _masked(params: optax.Params, kind: str) -> optax.Params:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: decay_kind(tuple(str(key.key) for key in path)) == kind, params
    )
