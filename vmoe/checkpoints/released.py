"""The checkpoints that the authors of V-MoE published, read and written.

Shapes and axis orders are the same here; only the names differ (``flax_names``). Settings
that do not follow from names and shapes are assumed to be those of the authors.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.checkpoints import chunked, chunked_write, flax_names
from vmoe.checkpoints.assemble import Conversion
from vmoe.checkpoints.checksums import by_name
from vmoe.config import MoEConfig, ViTConfig
from vmoe.config.fields import at_least
from vmoe.errors import UsageError

ASSUMED = MoEConfig(capacity_factor=1.05, transfer_dtype="bfloat16")
"""Of sparse blocks; 1.05 is the authors' capacity factor in pre-training."""

PUBLISHED = {"gelu": "tanh", "norm_epsilon": 1e-6, "fc_norm": False, "pre_norm": False}
NOT_REPRESENTABLE = {"pooling": "patch_mean", "positions": "none"}  # read back as something else


def conversion(prefix: Path, moe: MoEConfig) -> Conversion:
    """How to read a checkpoint.

    Args:
        prefix: of its files, PREFIX.index and PREFIX.data-nnnnn-of-NNNNN.
        moe: config of its sparse blocks, apart from the number of experts.

    Raises:
        Failure: a file is missing, or the index is corrupt.
    """
    return Conversion(chunked.read(prefix), flax_names.rename, moe=moe)


def write(prefix: Path, config: ViTConfig, params: Mapping[str, Any], *, shards: int = 1) -> None:
    """Writes a model as a checkpoint that the authors' code can read.

    Args:
        prefix: of the paths of the files.
        params: as nested dicts.
        shards: number of data files, over which the experts are split.

    Raises:
        UsageError: the published format cannot represent the model, or a file exists.
        Failure: a file cannot be written.
    """
    for field, value in PUBLISHED.items():
        if getattr(config, field) != value:
            raise UsageError(
                f"published checkpoints do not store this field, and are read with {value}; use "
                "another format",
                **{f"model.{field}": getattr(config, field)},
            )
    for field, value in NOT_REPRESENTABLE.items():
        if getattr(config, field) == value:
            raise UsageError(
                "a published checkpoint cannot represent it; use another format",
                **{f"model.{field}": value},
            )
    at_least(1).check(shards=shards)
    arrays = {
        f"params/{flax_names.published_name(path, config)}": np.asarray(value)
        for path, value in by_name(params).items()
    }
    chunked_write.write(prefix, arrays, shards=shards)
