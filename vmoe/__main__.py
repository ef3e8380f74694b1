"""``python -m vmoe`` and the command ``vmoe``; see ``vmoe/cli``."""

import os
import sys

from vmoe.host import signals, streams

XLA_LOG = {"TF_CPP_MIN_LOG_LEVEL": "3"}
"""Hides what XLA logs below the level of a fatal error: it calls compiling for two minutes an
error, and a program from the compilation cache a risk. An error that matters raises an exception,
too; a collective that waits for another device is only logged. ``--debug`` hides nothing."""


def main() -> int:
    """Runs the command, and returns its exit status."""
    streams.prepare()
    if "--debug" not in sys.argv:  # before jax is imported; the user's own setting is kept
        os.environ.update(XLA_LOG | os.environ)
    signals.exit_at_once()  # before the imports, which take a second
    from vmoe.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
