"""Training: ``train``, from a config to a run folder.

Names are imported when first used: ``vmoe plan`` needs parts of this package, and not the rest.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vmoe.train.init import InitFrom
    from vmoe.train.loop import train
    from vmoe.train.sinks import Sink

_MODULES = {
    "InitFrom": "vmoe.train.init",
    "Sink": "vmoe.train.sinks",
    "train": "vmoe.train.loop",
}

__all__ = ["InitFrom", "Sink", "train"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'vmoe.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
