"""Vision mixture-of-experts (V-MoE) models and a trainer in JAX and Flax NNX.

>>> import vmoe
>>> model = vmoe.create_model("vmoe_test_last2_e4")
>>> vmoe.list_models("vit_b*")
['vit_b16', 'vit_b32']

Names are imported on first use, so that ``import vmoe`` is fast.
"""

import importlib
from typing import Any

from vmoe.host.compiler import warn_if_wrong

_MODULES = {
    "MoE": "vmoe.nn.moe",
    "Router": "vmoe.routing",
    "create_model": "vmoe.factory",
    "list_models": "vmoe.factory",
    "load": "vmoe.factory",
    "save": "vmoe.factory",
    "upcycle": "vmoe.surgery",
    "moefy": "vmoe.surgery",
    "analysis": "vmoe.analysis",
    "classic": "vmoe.classic",
    "multitask": "vmoe.multitask",
}

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vmoe' has no attribute {name!r}")
    module = importlib.import_module(_MODULES[name])
    return module if _MODULES[name] == f"vmoe.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


warn_if_wrong()
