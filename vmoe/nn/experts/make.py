"""New experts from their config."""

import itertools
import typing
from collections.abc import Callable

import jax
from flax import nnx

from vmoe.config import MoEConfig
from vmoe.config.experts import (
    Activation,
    AnyMlpExpert,
    AttentionExpert,
    CnnExpert,
    ConstantExpert,
    Expert,
    ExpertConfig,
    ExpertList,
    GatedMlpExpert,
    IdentityExpert,
    ListedExpert,
    MlpExpert,
    ZeroExpert,
)
from vmoe.fields import check_registered
from vmoe.nn.experts import modules
from vmoe.nn.experts.copies import Copies
from vmoe.nn.experts.interface import Experts
from vmoe.nn.experts.mixed import MixedExperts
from vmoe.nn.experts.mlps import StackedMlps
from vmoe.nn.keys import Rngs
from vmoe.nn.mlp import Hidden

MODULES: dict[type[ExpertConfig], Callable[..., nnx.Module]] = {
    CnnExpert: lambda config, width, dtype, rngs: modules.Cnn(
        width, config.kernel_size, dtype=dtype, rngs=rngs
    ),
    AttentionExpert: lambda config, width, dtype, rngs: modules.Attention(
        width, config.num_heads, dtype=dtype, rngs=rngs
    ),
    IdentityExpert: lambda config, width, dtype, rngs: modules.Identity(),
    ZeroExpert: lambda config, width, dtype, rngs: modules.Zero(),
    ConstantExpert: lambda config, width, dtype, rngs: modules.Constant(
        width, dtype=dtype, rngs=rngs
    ),
}
"""Makes one expert, for each kind whose experts are copies of a module."""

check_registered(
    [kind for kind in typing.get_args(ListedExpert) if not issubclass(kind, AnyMlpExpert)],
    MODULES,
    "nn.experts.make.MODULES",
)


def make_experts(
    config: MoEConfig,
    width: int,
    mlp_dim: int,
    *,
    activation: Activation = "gelu_tanh",
    dtype: jax.typing.DTypeLike | None = None,
    rngs: Rngs,
) -> Experts:
    """The experts of a layer, with new parameters.

    Args:
        dtype: see ``MoE.from_config``.
    """

    def of_kind(expert: Expert, e: int) -> Experts:
        if isinstance(expert, MlpExpert | GatedMlpExpert):
            gated = isinstance(expert, GatedMlpExpert)
            return StackedMlps(
                e,
                width,
                expert.mlp_dim or mlp_dim,
                hidden=Hidden(expert.activation or activation, expert.dropout, gated=gated),
                shared_init=expert.shared_init,
                implementation=expert.implementation,
                rngs=rngs,
            )
        make = MODULES[type(expert)]
        if expert.shared_init:
            return Copies([make(expert, width, dtype, rngs)] * e)
        return Copies([make(expert, width, dtype, rngs) for _ in range(e)])

    if not isinstance(config.experts, ExpertList):
        return of_kind(config.experts, config.num_experts)
    alike = [(expert, len(list(run))) for expert, run in itertools.groupby(config.experts.each)]
    return MixedExperts([of_kind(expert, e) for expert, e in alike])
