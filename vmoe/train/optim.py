"""The optimiser and its learning rate."""

import jax
import optax

from vmoe.config import Optim


def schedule(config: Optim, steps: int) -> optax.Schedule:
    """Linear from 0 to the peak over the warmup, then a cosine to ``final_lr`` of it."""
    return optax.warmup_cosine_decay_schedule(
        0.0, config.lr, config.warmup, steps, end_value=config.lr * config.final_lr
    )


def optimizer(config: Optim, steps: int) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled decay of every kernel, learning rate."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adamw(
            schedule(config, steps),
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=kernels,
        ),
    )


def kernels(params: optax.Params) -> optax.Params:
    """True for every array named kernel: head and routers included, biases and positions not."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)
