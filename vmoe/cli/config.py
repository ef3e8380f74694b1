"""``vmoe config``."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from vmoe.cli.arguments import parse_with_config
from vmoe.config import TrainConfig, to_json


@dataclasses.dataclass(frozen=True)
class ConfigArgs:
    """Print the config of a run, with all its fields, as JSON."""

    config: Path
    """Recipe: a Python file that defines `config = TrainConfig(...)`, or a run's config.json."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")]


def run(argv: Sequence[str]) -> None:
    """Prints the config that the words describe."""
    print(to_json(parse_with_config(ConfigArgs, "config", argv).run))
