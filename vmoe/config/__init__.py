"""The config of a run: frozen dataclasses in plain Python that import neither jax nor flax.

A file in ``configs/`` builds one ``TrainConfig``; ``replace`` makes a variant of it. The options of
the command line are the same fields. A config with incompatible settings raises a ``UsageError``
that names them.
"""

from vmoe.config.data import DataConfig, PreprocessingConfig, RandAugmentConfig
from vmoe.config.evaluation import EvalConfig, RoutingOverrides
from vmoe.config.experts import (
    AttentionExpert,
    CnnExpert,
    ExpertList,
    GatedMlpExpert,
    IdentityExpert,
    MlpExpert,
    ZeroExpert,
)
from vmoe.config.fewshot import FewShotConfig
from vmoe.config.fields import replace
from vmoe.config.files import from_json, load, to_json
from vmoe.config.gates import CosineGate, LinearGate, MlpGate, NoisyGate, SlotGate
from vmoe.config.model import MoEConfig, ViTConfig
from vmoe.config.optim import LrFactorsConfig, OptimConfig, WeightDecayConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.config.routers import (
    AuxLossWeights,
    BiasBalanced,
    ExpertChoice,
    GShard,
    Hash,
    Random,
    Router,
    Soft,
    Switch,
    TokenChoice,
)
from vmoe.config.train import TrainConfig

__all__ = [
    "AttentionExpert",
    "AuxLossWeights",
    "BiasBalanced",
    "CnnExpert",
    "CosineGate",
    "DataConfig",
    "EvalConfig",
    "ExpertChoice",
    "ExpertList",
    "FewShotConfig",
    "GShard",
    "GatedMlpExpert",
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
    "Router",
    "RoutingOverrides",
    "SlotGate",
    "Soft",
    "Switch",
    "TokenChoice",
    "TrainConfig",
    "ViTConfig",
    "WeightDecayConfig",
    "ZeroExpert",
    "from_json",
    "load",
    "replace",
    "to_json",
]
