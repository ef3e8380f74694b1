"""Runs a command, and turns its errors into one line and an exit status.

Exit status:
    0               done
    1               the work failed
    2               wrong usage
    3               a check found a problem
    75              a signal stopped a run, which can be resumed
    129, 130, 143   SIGHUP, SIGINT or SIGTERM ended the command at once
    141             the reader of stdout is gone

``--debug`` shows the traceback of an error. ``--import FILE`` before the command runs a Python file
first, such as one that defines the router of a run.
"""

import importlib
import importlib.metadata
import logging
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from vmoe.errors import (
    OUT_OF_MEMORY,
    UsageError,
    VmoeError,
    is_out_of_memory,
    one_line,
    require,
    unknown,
)
from vmoe.host.cache import keep_programs

GROUPS = {  # each command a module with a function ``run``: in this package, or of a study
    "Use a trained model": {
        "predict": "classify image files, and show the experts used",
        "evaluate": "evaluate a trained model on a whole split",
        "probe": "evaluate its features by linear probes on a few images of each class",
        "models": "list the named models, their parameters and FLOPs",
        "summary": "show the parameters and FLOPs of one model",
    },
    "Analyze it": {
        "routing": "show how a trained model uses its experts, and whether that is healthy",
        "capacity": "search k, capacity factor and priority per block within a FLOPs budget",
        "attack": "measure robustness to adversarial images",
        "mates": "measure how far the other images of a group change a prediction",
    },
    "Convert it": {
        "convert": "write a trained model in another format",
        "inspect": "list what a file of weights holds",
        "upcycle": "turn a dense model into a sparse one",
        "prune": "remove experts, and measure the accuracy before and after",
    },
    "Train": {
        "train": "train a model; run the same command again to resume",
        "config": "print the config of a run as JSON",
        "plan": "estimate memory, communication and step time on hypothetical devices",
    },
    "This installation": {
        "check": "check versions, devices, computed numbers, decoders and caches",
    },
}
MEMORY = {  # what helps when a command runs out of memory; others: a smaller batch
    "predict": "give fewer images at once",
    "train": "use --accumulate 2 or more, --model.remat or a smaller --batch-size; vmoe plan shows "
    "what takes the memory",
    **dict.fromkeys(("models", "summary", "config", "plan"), "use a smaller model"),
    **dict.fromkeys(("convert", "inspect", "upcycle"), "use a machine with more memory"),
}
MOVED = {  # an option of before -> its command
    ("evaluate", "--fewshot"): "probe",
    ("attack", "--target"): "mates",
    ("attack", "--mates"): "mates",
}
COMMANDS = [command for group in GROUPS.values() for command in group]
STUDIES = {
    "routing": "routing.command",
    "capacity": "capacity.command",
    "attack": "attack.command",
    "mates": "attack.mates_command",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: command-line arguments without the name of the program; ``sys.argv[1:]`` if None.

    Returns:
        the exit status.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if debug := "--debug" in argv:
        argv.remove("--debug")
    else:  # libraries log errors in their threads; the command prints one line itself
        logging.disable(logging.ERROR)
        sys.unraisablehook = lambda _: None
    status = _run(argv, debug=debug)
    try:
        sys.stdout.flush()
    except OSError:  # reported; the interpreter would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


def _run(argv: list[str], *, debug: bool) -> int:
    try:
        keep_programs()
        while argv[:1] == ["--import"]:
            require(len(argv) > 1, "--import needs a Python file")
            from vmoe.config.files import execute  # imports jax

            execute(Path(argv[1]))
            del argv[:2]
        _dispatch(argv)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout closed the pipe
        return 141
    except (VmoeError, OSError, MemoryError, RuntimeError, AssertionError, ValueError) as error:
        line, status = _expected_error(error, next(iter(argv), ""))
        if not line:
            raise
        if debug:
            traceback.print_exc()
        options = _options(error, argv)
        named = f" ({', '.join(options)})" if options else ""
        print(f"vmoe: {one_line(line)}{named}", file=sys.stderr)
        return status
    return 0


def _dispatch(argv: Sequence[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return
    if argv[0] == "--version":
        print(f"vmoe {importlib.metadata.version('vmoe')}")
        return
    command, *arguments = argv
    if command not in COMMANDS:
        raise UsageError(unknown("no command", command, COMMANDS))
    for option in re.findall(r"^--[a-z]+", "\n".join(arguments), re.MULTILINE):
        if option == "--target" and {"images", "--target=images"} & {*arguments}:
            raise UsageError("vmoe attack changes the images themselves: leave --target images out")
        if own := MOVED.get((command, option)):
            moved = f"{option} of vmoe {command} is a command now: vmoe {own}"
            raise UsageError(f"{moved} (vmoe {own} --help lists its options)")
    try:
        module_of(command).run(arguments)
    except SystemExit as end:  # without a status, the help was asked for and is printed
        if end.code:
            raise


def module_of(command: str) -> ModuleType:
    """The module of a command; imported on demand, without those of the other commands."""
    location = f"studies.{STUDIES[command]}" if command in STUDIES else f"cli.{command}"
    return importlib.import_module(f"vmoe.{location}")


def _options(error: BaseException, argv: Sequence[str]) -> list[str]:
    """The options of the fields that are wrong, as far as they were given, and of the remedies."""
    if not isinstance(error, VmoeError):  # it may be that jax, which they import, cannot be
        return []
    from vmoe.cli.arguments import options_of, remedies_of  # brings tyro

    given = options_of(getattr(error, "fields", ()), argv)
    if not (remedies := getattr(error, "remedies", {})):
        return given
    kind = getattr(module_of(argv[0]), f"{argv[0].title()}Args", None)
    helpful = remedies_of(remedies, kind) if kind else []
    return [option for option in given if option not in map(_name, helpful)] + helpful


def _name(option: str) -> str:
    return option.partition(" ")[0]


def _expected_error(error: BaseException, command: str) -> tuple[str, int]:
    """One line and the exit status for an expected error; an empty line for a bug."""
    match error:
        case VmoeError():
            return str(error), error.status
        case OSError() if error.errno is not None:
            place = error.filename or "cannot write output"  # a stream has no name
            return f"{place}: {error.strerror}", 1
    if is_out_of_memory(error):
        return f"{OUT_OF_MEMORY}: {MEMORY.get(command, 'use a smaller --batch-size')}", 1
    wrong = _wrong_environment(error)
    return (str(wrong), wrong.status) if wrong else ("", 1)


def _wrong_environment(error: BaseException) -> UsageError | None:
    """The error of a variable of JAX, if it is the cause: JAX raises errors of several types."""
    if isinstance(error, ValueError):  # when it is imported
        flag = re.search(r"\bjax_\w+", str(error), re.IGNORECASE)
        name = flag[0].upper() if flag else ""
        if name in os.environ:
            return UsageError(f"{error}; unset it, or correct it", **{name: os.environ[name]})
    elif isinstance(error, RuntimeError | AssertionError) and "jax" in sys.modules:
        from vmoe.distributed import check_devices

        try:
            check_devices()
        except UsageError as missing:
            return missing
    return None


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = list[str]()
    for title, group in GROUPS.items():
        lines += ["", f"{title}:"]
        lines += [f"  vmoe {command:<{width}}  {what}" for command, what in group.items()]
    return "\n".join(
        [
            "Vision Mixture-of-Experts.",
            *lines,
            "",
            "vmoe COMMAND --help lists the options; --debug shows the traceback of an error;",
            "vmoe --import FILE COMMAND first runs a Python file, such as one with your routers;",
            "vmoe --version prints the version.",
        ]
    )
