"""Gates: modules that compute router logits from tokens.

A gate has the parameters; the router (``vmoe/routing``) assigns tokens to slots. A gate is one file
here, a frozen dataclass in ``vmoe/config/gates.py`` that is a member of ``Gate``, and one line in
``GATES``. In Python any module that maps tokens to logits is a gate.
"""

import typing

from vmoe.config import gates as configs
from vmoe.fields import check_registered
from vmoe.nn.gates.cosine import Cosine
from vmoe.nn.gates.interface import Gate, NoisyLogits
from vmoe.nn.gates.linear import Linear
from vmoe.nn.gates.mlp import Mlp
from vmoe.nn.gates.noisy import Noisy
from vmoe.nn.gates.slots import Slots

GATES: dict[type[configs.GateConfig], type[Gate]] = {
    configs.LinearGate: Linear,
    configs.NoisyGate: Noisy,
    configs.CosineGate: Cosine,
    configs.MlpGate: Mlp,
    configs.SlotGate: Slots,
}
"""The module for each type of gate config."""

check_registered(typing.get_args(configs.Gate), GATES, "nn.gates.GATES")

__all__ = ["GATES", "Cosine", "Gate", "Linear", "Mlp", "Noisy", "NoisyLogits", "Slots"]
