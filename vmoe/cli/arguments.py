"""Parses the arguments of a command into its dataclass, with tyro."""

import contextlib
import dataclasses
import io
import operator
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from vmoe import config as configs
from vmoe.config.train import ANY_LENGTH, LENGTHS
from vmoe.errors import UsageError

Arguments = TypeVar("Arguments")


def parse(kind: type[Arguments], command: str, argv: Sequence[str], **defaults: Any) -> Arguments:
    """The arguments of a command.

    Args:
        kind: a dataclass whose fields are the options.
        defaults: values of fields that are not given and have no default of their own.

    Raises:
        UsageError: an option is unknown, missing or has a wrong value; one line.
        SystemExit: --help was given, and the help is printed.
    """
    assert dataclasses.is_dataclass(kind)
    missing, absent = {}, []
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING:
            missing[field.name] = tyro.MISSING
        if field.type in (Path, int):  # other fields without a default are positional, or a config
            option = f"--{field.name.replace('_', '-')}"
            value = _option_value(argv, option)  # raises if empty: Path("") means "."
            if value is None and field.default is dataclasses.MISSING:
                absent.append(option)
    if absent and not {"-h", "--help"} & {*argv}:
        plural = "s" * (len(absent) > 1)
        raise UsageError(
            f"missing required option{plural}: {', '.join(absent)} {_see_help(command)}"
        )
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            args = tyro.cli(
                kind,
                prog=f"vmoe {command}",
                args=argv,
                default=kind(**missing | defaults),
                config=(tyro.conf.AvoidSubcommands,),
            )
            _refuse_without_effect(args)
            return args
        except SystemExit as stop:
            if stop.code == 0:  # --help
                raise
    message = _one_line(stderr.getvalue())
    if field := re.match(r"Error parsing [a-z_.]+: ", message):  # a config refused its values
        raise UsageError(message[field.end() :])
    if re.search(r"\.kind'\. Expected one of \('\w+',\)", message):  # the options are those of one
        message += " Another kind is named in the config file, and then has options."
    raise UsageError(f"{message} {_see_help(command)}")


def _refuse_without_effect(args: Any) -> None:
    """Refuses options that change nothing beside the others.

    The class of the arguments declares them, in ``no_effect``: the name of a field, and "with" or
    "without" another, OTHER if it only has to be given, or OTHER=VALUE or OTHER=VALUE|VALUE.
    """
    for name, condition in getattr(args, "no_effect", {}).items():
        word, other = condition.split()
        other, _, value = other.partition("=")
        actual = str(getattr(args, other))
        holds = actual in value.split("|") if value else _given(args, other)
        if _given(args, name) and holds == (word == "with"):
            value = actual if value and holds else value
            beside = f"--{other.replace('_', '-')} {value}".strip()
            remedy = "leave it out" if word == "with" else "give both or neither"
            raise UsageError(f"{_option(args, name)} has no effect {word} {beside}: {remedy}")


def _given(args: Any, name: str) -> bool:
    """Whether a field, or one in a section, such as method.path, differs from its default."""
    section, _, rest = name.partition(".")
    (default,) = (field.default for field in dataclasses.fields(args) if field.name == section)
    value = getattr(args, section)
    return value != default if not rest else getattr(value, rest) != getattr(default, rest)


def _option(args: Any, name: str) -> str:
    """The option of a field, with its value."""
    value = operator.attrgetter(name)(args)
    option = name.removeprefix("method.").replace("_", "-")  # its fields are options of their own
    if isinstance(value, bool):
        return f"--{option}" if value else f"--no-{option}"
    if dataclasses.is_dataclass(value):
        return f"--{option}.*"
    return f"--{option} {' '.join(value) if isinstance(value, tuple) else value}".strip()


def _see_help(command: str) -> str:
    return f"(vmoe {command} --help lists all options)"


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """Arguments of a command that takes a config; every field of the config is an option."""

    config: Path
    """Recipe: a Python file that defines `config = TrainConfig(...)`, or a run's config.json."""
    run: Annotated[configs.TrainConfig, tyro.conf.arg(name="")]


WithConfig = TypeVar("WithConfig", bound=RunArgs)


def parse_with_config(kind: type[WithConfig], command: str, argv: Sequence[str]) -> WithConfig:
    """The arguments of a command that takes a config.

    ``--config`` names the file from which ``run`` is loaded; other options change fields of it. A
    length in steps, epochs or images replaces the length of the config.

    Raises:
        UsageError: as ``parse``; or the config cannot be loaded.
    """
    path = _option_value(argv, "--config")
    config = configs.load(path) if path else configs.TrainConfig()
    for name in LENGTHS:
        if _option_value(argv, f"--{name}") is not None:  # which replaces ANY_LENGTH
            config = configs.replace(config, **dict.fromkeys(LENGTHS) | {name: ANY_LENGTH})
    return parse(kind, command, argv, run=config)


def _option_value(argv: Sequence[str], option: str) -> str | None:
    """The value of an option, before parsing; None if it is not given.

    Raises:
        UsageError: the value is empty.
    """
    value = None
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        name, equals, own = word.partition("=")
        if name.replace("_", "-") == option:  # either spelling, as for tyro
            value = own if equals else following
    if value == "":
        raise UsageError(f"{option} is empty")
    return value


def _one_line(box: str) -> str:
    """The text of tyro's error without the box around it and without its hints at the help."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    text = " ".join(line for line in lines if line.strip("-"))  # dashes: the box in ASCII
    return text.partition(" For full helptext")[0].partition(" Argument helptext")[0]


def check_outputs(args: Any, *files: str, folders: Sequence[str] = ()) -> None:
    """Checks, before any work, that what is written to paths can be there.

    Args:
        files: names of fields that hold the path of a file or None.
        folders: of those that hold the path of a folder or None.

    Raises:
        UsageError: a parent folder is missing, or something else is there, such as /dev/null, which
            a file would replace.
    """
    for name in (*files, *folders):
        path, kind = getattr(args, name), "folder" if name in folders else "file"
        if path and not path.parent.is_dir():
            raise UsageError(f"{name}={path}: no folder {path.parent}; make it first")
        if path and path.exists() and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise UsageError(f"{name}={path}: it is not a {kind}; give a {kind}")
