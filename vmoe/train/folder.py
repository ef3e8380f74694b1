"""The folder of a run: it explains itself, and belongs to one config.

config.json        the run, enough to run it again    model.txt     the model on one page
environment.json   versions and devices               classes.txt   names, in their order
metrics.csv        a row for each report              checkpoints/  STEP/ ...
"""

import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import jax

from vmoe import config as configs
from vmoe.analysis.summary import summarize
from vmoe.checkpoints.load import run_config
from vmoe.config import Train, UsageError


def claim(workdir: Path, config: Train, class_names: tuple[str, ...]) -> None:
    """Makes a new run folder that explains itself, or checks that one is this run's.

    Raises:
        UsageError: the folder was made with another config, or cannot be written.
    """
    if (workdir / "config.json").exists():
        if run_config(workdir) != config:
            raise UsageError(
                f"{workdir} holds a run of another config: use another --workdir, or remove it"
            )
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _write(workdir / "environment.json", json.dumps(environment(), indent=2))
        _write(workdir / "model.txt", summarize(config.model, title="model"))
        _write(workdir / "classes.txt", "\n".join(class_names))
        _write(workdir / "config.json", configs.to_json(config))
    except OSError as error:
        raise UsageError(f"--workdir {workdir}: {error.strerror}") from None


def environment() -> dict[str, Any]:
    """Versions and devices, as far as a result may depend on them."""
    packages = ("vmoe", "jax", "jaxlib", "flax", "optax", "grain", "numpy")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "devices": [str(device) for device in jax.devices()],
        **{name: importlib.metadata.version(name) for name in packages},
    }


def _write(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text + "\n")
    os.replace(beside, path)
