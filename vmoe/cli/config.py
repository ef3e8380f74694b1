"""``vmoe config``."""

import dataclasses
from collections.abc import Sequence

from vmoe.cli.arguments import RunArgs, parse_with_config
from vmoe.config import to_json


@dataclasses.dataclass(frozen=True)
class ConfigArgs(RunArgs):
    """Print the config of a run, with all its fields, as JSON.

    Example: `vmoe config --config digits --optim.lr 1e-3`
    """


def run(argv: Sequence[str]) -> None:
    """Prints the config that the arguments describe."""
    print(to_json(parse_with_config(ConfigArgs, "config", argv).run))
