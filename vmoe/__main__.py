"""``python -m vmoe`` and the command ``vmoe``; see ``vmoe/cli``."""

import sys

from vmoe import signals, streams


def main() -> int:
    """Runs the command, and returns its exit status."""
    streams.prepare()
    signals.exit_at_once()  # before the imports, which take a second
    from vmoe.cli.main import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
