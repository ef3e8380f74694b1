"""Run a script of the project in the process of a test, which saves its imports."""

import contextlib
import importlib
import io
import signal
import sys
from pathlib import Path

import pytest

from scripts.experiments.framework.runs import Experiment
from tests.command import vmoe
from vmoe.host.signals import SIGNALS


def run(name: str, *arguments: str | Path) -> None:
    """Runs ``python -m scripts.NAME`` with arguments of its command line.

    Raises:
        SystemExit: as the script.
    """
    handlers = {number: signal.getsignal(number) for number in SIGNALS}  # some set their own
    wakeup = signal.set_wakeup_fd(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        try:
            importlib.import_module(f"scripts.{name}").main()
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, handler)


def experiment(name: str, *arguments: str | Path) -> None:
    """Runs ``python -m scripts.experiments NAME``; errors as for ``run``."""
    run("experiments.__main__", name, *arguments)


def commands_in_this_process(patch: pytest.MonkeyPatch) -> None:
    """The commands that an experiment runs start no process, which saves their imports."""

    def printed(_: Experiment, flag: str, module: str, *arguments: object) -> str:
        assert flag == "-m"
        words = list(map(str, arguments))
        if module == "vmoe":
            result = vmoe(*words)
            assert result.returncode == 0, result.stderr
            return result.stdout
        # Not by run: an experiment has threads for its jobs, and only the main one handles signals.
        name = f"{module}.__main__" if module == "scripts.experiments" else module
        with contextlib.redirect_stdout(io.StringIO()) as out, pytest.MonkeyPatch.context() as own:
            own.setattr(sys, "argv", [module, *words])
            importlib.import_module(name).main()
        return out.getvalue()

    patch.setattr(Experiment, "python", printed)
