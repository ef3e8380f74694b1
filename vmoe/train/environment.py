"""Versions, devices and the commit of a run, and what of them has changed since."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import vmoe


def environment() -> dict[str, Any]:
    """Versions, devices and the code's commit, as far as a result may depend on them."""
    packages = ("vmoe", "jax", "jaxlib", "flax", "optax", "grain", "numpy", "pillow")
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "devices": [device.device_kind for device in jax.devices()],
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _commit() -> str | None:
    """The git commit of this code, "+ changes" if it has any; None outside a checkout."""
    root = Path(vmoe.__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
        return done.stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + (" + changes" if changes else "") or None
    except OSError:  # no git on this machine
        return None
