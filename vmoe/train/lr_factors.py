"""Learning rate factors of parameters, and parts that are frozen.

A parameter's factor is the factor of its part (``LrFactorsConfig``) times the factor of its layer
(``layer_decay``). A part with the factor 0 is frozen: its parameters are constants of the loss.
They have no gradients, optimizer state or moving averages, and the backward pass computes nothing
for them.
"""

from collections.abc import Iterator
from typing import Any

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from vmoe.config import LrFactorsConfig, OptimConfig
from vmoe.nn.parts import SHARED, STATE, part_of

Params = dict[str, Any]
Path = tuple[str | int, ...]

ONE = LrFactorsConfig()
EMBEDDINGS = ("patches", "class_token", "registers", "positions", "pre_norm")


def lr_kind(path: Path, factors: LrFactorsConfig = ONE) -> str:
    """The field of ``LrFactorsConfig`` that applies to a parameter.

    Args:
        factors: decides whether shared experts have a factor of their own.

    >>> lr_kind(("blocks", 1, "mlp", "experts", "up", "bias"))
    'experts'
    """
    part = part_of(path)
    if part == SHARED:
        return "experts" if factors.shared_experts is None else "shared_experts"
    return part if part in ("head", "routers", "experts") else "others"


def layers_above(path: Path, depth: int) -> int:
    """The exponent of ``layer_decay`` for a parameter: the number of layers after its own.

    The layers are: the embeddings, with the norm before the blocks; each block; everything after
    the blocks (last norm, attention pool, head). This is the numbering of BEiT (arXiv 2106.08254,
    ``optim_factory.py``) and MAE (arXiv 2111.06377, ``util/lr_decay.py``). timm assigns the norms
    outside the blocks to the last block.

    >>> [layers_above(path, 12) for path in [("positions",), ("blocks", 11), ("norm", "scale")]]
    [13, 1, 0]
    """
    if path[0] == "blocks":
        return depth - int(path[1])
    return depth + 1 if path[0] in EMBEDDINGS else 0


def trained_params(config: OptimConfig, params: Params) -> Params:
    """The parameters of the parts that are not frozen, without the state of routers."""
    return unflatten_dict(
        {
            path: leaf
            for path, leaf in flatten_dict(params).items()
            if part_of(path) != STATE and _part_factor(config, path)
        }
    )


def _part_factor(config: OptimConfig, path: Path) -> float:
    """The factor of the part that a parameter belongs to."""
    return getattr(config.lr_factors, lr_kind(path, config.lr_factors))


def scale_by_lr_factors(config: OptimConfig, depth: int) -> optax.GradientTransformation:
    """Multiplies the update of each parameter by its factor."""

    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        keys = tuple(key.key for key in path)
        layer_factor = config.layer_decay ** layers_above(keys, depth)
        return update * (_part_factor(config, keys) * layer_factor)

    return optax.stateless(lambda updates, _: jax.tree.map_with_path(scale, updates))


def has_lr_factors(config: OptimConfig) -> bool:
    """Whether any factor differs from 1."""
    return config.lr_factors != ONE or config.layer_decay != 1


def training_messages(config: OptimConfig, params: Params) -> Iterator[str]:
    """A message about which parts are trained, if a part is frozen or has another learning rate."""
    if not has_lr_factors(config):
        return
    sizes = dict.fromkeys(("head", "routers", "experts", "shared_experts", "others"), 0)
    for path, leaf in flatten_dict(params).items():
        if part_of(path) != STATE:
            sizes[lr_kind(path, config.lr_factors)] += leaf.size
    factors = {kind: getattr(config.lr_factors, kind) for kind, size in sizes.items() if size}
    trained = [
        kind if factor == 1 else f"{kind} at {factor:g} x lr"
        for kind, factor in factors.items()
        if factor
    ]
    frozen = [kind for kind, factor in factors.items() if not factor]
    count = sum(sizes[kind] for kind, factor in factors.items() if factor)
    message = f"training {count:,} of {sum(sizes.values()):,} parameters ({', '.join(trained)})"
    if frozen:
        message += f"; frozen: {', '.join(frozen)}"
    if config.layer_decay != 1:
        message += f"; each layer has {config.layer_decay:g} times the lr of the next"
    yield message
