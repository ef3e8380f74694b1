"""Attack runs, commands and the readers of models for longer than the tests do.

    python -m tests.hostility kill       # runs, which must resume with bitwise equal results
    python -m tests.hostility stress     # commands, checkpoints, images and CSV files
    python -m tests.hostility fuzz       # the readers of trained models

Each has options, see its ``--help``; the exit status is 0 if it finds nothing, else 1.
"""

import argparse
import os
import sys

from tests.command import ROOT
from tests.hostility import fuzz, kill, stress

ATTACKS = {"kill": kill, "stress": stress, "fuzz": fuzz}


def main() -> int:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "jax"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # commands start often
    parser = argparse.ArgumentParser(
        prog="python -m tests.hostility", description=__doc__.splitlines()[0]
    )
    attacks = parser.add_subparsers(required=True, metavar="|".join(ATTACKS))
    for name, module in ATTACKS.items():
        text = module.__doc__.splitlines()[0]
        attack = attacks.add_parser(name, help=text, description=text)
        module.add_options(attack)
        attack.set_defaults(main=module.main)
    options = parser.parse_args()
    return options.main(options)


if __name__ == "__main__":
    sys.exit(main())
