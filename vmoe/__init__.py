"""Vision Mixture-of-Experts in JAX: the published V-MoE models and a trainer.

>>> import vmoe
>>> model = vmoe.create_model("vmoe_tiny_last2_e4")
>>> vmoe.list_models("vit_b*")
['vit_b16', 'vit_b32']

Names come from their rooms when first used, so that ``import vmoe`` itself is quick.
"""

import importlib
from typing import Any

_HOMES = {
    "create_model": "vmoe.models",
    "list_models": "vmoe.models",
    "load": "vmoe.factory",
    "analysis": "vmoe.analysis",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'vmoe' has no attribute {name!r}")
    home = importlib.import_module(_HOMES[name])
    return home if _HOMES[name] == f"vmoe.{name}" else getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
