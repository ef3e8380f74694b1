"""Run a script of the project in the process of a test, which saves its imports."""

import importlib
import signal
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.command import ROOT
from vmoe.signals import SIGNALS


def module(name: str) -> ModuleType:
    """A script as a module; scripts import each other by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return importlib.import_module(name)


def run(name: str, *arguments: str | Path) -> None:
    """Runs the main function of a script with arguments of its command line.

    Raises:
        SystemExit: as the script.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}  # some set their own
    wakeup = signal.set_wakeup_fd(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        try:
            module(name).main()
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)
