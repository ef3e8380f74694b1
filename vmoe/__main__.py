"""``python -m vmoe`` and the command ``vmoe``; see ``vmoe/cli``."""

import sys

from vmoe.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
