"""The config of a run: frozen dataclasses.

A file in ``configs/`` builds one ``TrainConfig``; ``replace`` makes a variant of it. The options of
the command line are the same fields. A config with incompatible settings raises a ``UsageError``
that names them.

Names are imported on first use, since routers, and so the config of a model, import jax.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmoe.config.data import DataConfig, PreprocessingConfig, RandAugmentConfig
    from vmoe.config.evaluation import EvalConfig, RoutingOverrides
    from vmoe.config.experts import (
        AttentionExpert,
        CnnExpert,
        ConstantExpert,
        ExpertList,
        GatedMlpExpert,
        IdentityExpert,
        MlpExpert,
        ZeroExpert,
    )
    from vmoe.config.fewshot import FewShotConfig
    from vmoe.config.files import from_json, load, to_json
    from vmoe.config.gates import CosineGate, LinearGate, MlpGate, NoisyGate, SlotGate
    from vmoe.config.model import Exchange, MoEConfig, ViTConfig
    from vmoe.config.optim import LrFactorsConfig, OptimConfig, WeightDecayConfig
    from vmoe.config.preprocessing import Preprocessing
    from vmoe.config.rotary import CenteredRotary, GoldenRotary, GridRotary
    from vmoe.config.train import TrainConfig
    from vmoe.fields import replace
    from vmoe.routing import (
        AnyRouter,
        AuxLossWeights,
        BiasBalanced,
        ByTask,
        ExpertChoice,
        ExpertRace,
        GShard,
        Hash,
        Random,
        ReLU,
        Router,
        Sinkhorn,
        Soft,
        Switch,
        TokenChoice,
        TopP,
        Transport,
        TransportExpertChoice,
    )

__all__ = [
    "AnyRouter",
    "AttentionExpert",
    "AuxLossWeights",
    "BiasBalanced",
    "ByTask",
    "CenteredRotary",
    "CnnExpert",
    "ConstantExpert",
    "CosineGate",
    "DataConfig",
    "EvalConfig",
    "Exchange",
    "ExpertChoice",
    "ExpertList",
    "ExpertRace",
    "FewShotConfig",
    "GShard",
    "GatedMlpExpert",
    "GoldenRotary",
    "GridRotary",
    "Hash",
    "IdentityExpert",
    "LinearGate",
    "LrFactorsConfig",
    "MlpExpert",
    "MlpGate",
    "MoEConfig",
    "NoisyGate",
    "OptimConfig",
    "Preprocessing",
    "PreprocessingConfig",
    "RandAugmentConfig",
    "Random",
    "ReLU",
    "Router",
    "RoutingOverrides",
    "Sinkhorn",
    "SlotGate",
    "Soft",
    "Switch",
    "TokenChoice",
    "TopP",
    "TrainConfig",
    "Transport",
    "TransportExpertChoice",
    "ViTConfig",
    "WeightDecayConfig",
    "ZeroExpert",
    "from_json",
    "load",
    "replace",
    "to_json",
]

_MODULES = (  # those without jax come first
    "fields",
    "config.preprocessing",
    "config.data",
    "config.fewshot",
    "config.experts",
    "config.gates",
    "config.rotary",
    "config.optim",
    "routing",
    "config.model",
    "config.evaluation",
    "config.train",
    "config.files",
)


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = vars(importlib.import_module(f"vmoe.{module}")).get(name)
            if found is not None and not isinstance(found, ModuleType):
                return globals().setdefault(name, found)
    raise AttributeError(f"module 'vmoe.config' has no attribute {name!r}")
