"""Stored runs of the authors' code: their arrays, by published name, in a model here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.checkpoints import flax_names
from vmoe.checkpoints.arrays import ArrayFile, ArrayInfo
from vmoe.checkpoints.assemble import Conversion, assemble
from vmoe.config import ViTConfig


def published_params(config: ViTConfig, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameters, by the reader of published checkpoints."""
    infos = {name: ArrayInfo(array.shape, array.dtype) for name, array in arrays.items()}
    file = ArrayFile(Path("stored"), infos, lambda names: ((name, arrays[name]) for name in names))
    return assemble(Conversion(file, flax_names.rename, config=config)).params
