"""Parses the arguments of a command into its dataclass, with tyro."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import itertools
import operator
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import docstring_parser
import tyro

from vmoe import config as configs
from vmoe.config.train import ANY_LENGTH, LENGTHS
from vmoe.errors import UsageError, choice, require
from vmoe.fields import kinds as kinds_of

Arguments = TypeVar("Arguments")
FIRST = (
    "steps",
    "epochs",
    "batch_size",
    "accumulate",
    "seed",
    "model.patch_size",
    "model.width",
    "model.depth",
    "model.image_size",
    "model.sparse_blocks",
    "model.dtype",
    "model.moe.num_experts",
    "model.moe.router.kind",
    "model.moe.router.k",
    "model.moe.router.capacity_factor",
    "data.name",
    "optim.lr",
    "optim.warmup_steps",
)
"""The options of a config that are changed first."""
WIDEST = 100  # columns of a help text


def parse(kind: type[Arguments], command: str, argv: Sequence[str], **defaults: Any) -> Arguments:
    """The arguments of a command.

    Args:
        kind: a dataclass whose fields are the options.
        defaults: values of fields that are not given and have no default.

    Raises:
        UsageError: an option is unknown, missing or has a wrong value; one line.
        SystemExit: --help was given, and the help is printed; of a command that takes a config the
            options in ``FIRST``, after ``--help SECTION`` those of a section of the config, and
            after ``--help all`` all options.
    """
    assert dataclasses.is_dataclass(kind)
    for name, config in defaults.items():
        defaults[name], argv = with_kinds(config, argv)
    options = given(argv)
    required = [field for field in dataclasses.fields(kind) if field.default is dataclasses.MISSING]
    for field in dataclasses.fields(kind):
        if field.type is Path and options.get(_option(field.name)) == "":  # to Python it means "."
            raise UsageError(f"{_option(field.name)} is empty")
    default = kind(**{field.name: tyro.MISSING for field in required} | defaults)
    if asked := {"-h", "--help"} & {*argv}:
        _join_lines(default)
        word = (*argv, "")[argv.index(asked.pop()) + 1]
        if issubclass(kind, RunArgs) and word != "all":
            print(_short_help(default, command, "" if word.startswith("-") else word))
            raise SystemExit
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            args = tyro.cli(
                kind,
                prog=f"vmoe {command}",
                args=argv,
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
            _refuse_without_effect(args)
            return _with_home(args)
        except SystemExit as stop:
            if stop.code == 0:  # --help
                raise
            if refused := _refused(stop):
                raise refused from None
    message = _one_line(stderr.getvalue())
    # Of the other types, one without a default is positional, or a config.
    names = [_option(field.name) for field in required if field.type in (Path, int)]
    if absent := [option for option in names if option not in options]:
        message = f"missing required option{'s' * (len(absent) > 1)}: {', '.join(absent)}"
    every = "--help all" if issubclass(kind, RunArgs) else "--help"
    raise UsageError(f"{message} (vmoe {command} {every} lists all options)")


def _short_help(default: Any, command: str, section: str) -> str:
    """The help on the options of a section, or on the command's own and those in ``FIRST``."""
    fields, of_config = dict(_fields(default)), dict(_fields(default.run))
    own = [name for name in fields if name not in of_config]
    own += [name for name in FIRST if name in fields]  # a soft router has no k
    if section:
        path = section.replace("-", "_")
        own = [name for name in fields if name.startswith(f"{path}.")]
        sections = {name.partition(".")[0] for name in fields if "." in name}
        require(bool(own), choice(section, ["all", *sorted(sections)]), help=section)
    lines = [f"usage: vmoe {command} [OPTIONS]", "", inspect.getdoc(default) or "", ""]
    fill = functools.partial(textwrap.fill, width=min(WIDEST, shutil.get_terminal_size().columns))
    for name in own:
        value, field = fields[name]
        choices = typing.get_args(field.type) if typing.get_origin(field.type) is Literal else ()
        words = f" {{{','.join(choices)}}}" if len(choices) > 1 else ""
        shown = "required" if value is tyro.MISSING else f"default: {value!r}"
        text = f"{field.metadata['help']} ({shown})"
        lines.append(f"  {_option(name)}{words}")
        lines.append(fill(text, initial_indent=" " * 6, subsequent_indent=" " * 6))
    rest = f"--help all shows all {len(fields)} options, --help SECTION those of a section, such as"
    return "\n".join([*lines, "", fill(f"{rest} model, model.moe.router, data or optim.")])


def _fields(
    config: Any, path: str = ""
) -> Iterator[tuple[str, tuple[Any, dataclasses.Field[Any]]]]:
    """The options of a dataclass by their paths, each with its value and its field.

    Those of ``run`` have no prefix; a section that is None has none.
    """
    for field in dataclasses.fields(config):
        value, hints = getattr(config, field.name), typing.get_args(field.type)
        inner = "" if field.name == "run" else f"{path}{field.name}."
        if dataclasses.is_dataclass(value):
            yield from _fields(value, inner)
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for i, part in enumerate(value):
                yield from _fields(part, f"{inner}{i}.")
        elif value is not None or not (
            kinds_of(field.type) or any(map(dataclasses.is_dataclass, hints))
        ):
            yield f"{path}{field.name}", (value, field)


def _with_home(args: Arguments) -> Arguments:
    """The arguments with ~ expanded in paths: a shell leaves it in --workdir=~/runs/digits."""
    assert dataclasses.is_dataclass(args) and not isinstance(args, type)
    fields = {field.name: getattr(args, field.name) for field in dataclasses.fields(args)}
    paths = {k: v.expanduser() for k, v in fields.items() if isinstance(v, Path)}
    several = {
        k: tuple(x.expanduser() for x in v)
        for k, v in fields.items()
        if isinstance(v, tuple) and v and all(isinstance(x, Path) for x in v)
    }
    return dataclasses.replace(args, **paths, **several)


def _join_lines(value: Any) -> None:
    """Gives the options of a dataclass their texts, without the line breaks of the source.

    tyro would take the same texts, but keep each break, since the lines after it are indented.
    """
    if isinstance(value, tuple):
        for each in value:
            _join_lines(each)
    for kind in filter(dataclasses.is_dataclass, type(value).__mro__):
        _join_lines_of(kind)
        for field in dataclasses.fields(kind):
            _join_lines(getattr(value, field.name))


@functools.cache
def _join_lines_of(kind: Any) -> None:
    """The same for the fields of one class; once, since its source is read."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for text in docstring_parser.parse_from_object(kind).params:
        if text.arg_name in fields and text.description:
            joined = " ".join(text.description.split())
            fields[text.arg_name].metadata = types.MappingProxyType({"help": joined})


def _refused(error: BaseException | None) -> UsageError | None:
    """The UsageError of a config, if it caused another error."""
    if error is None or isinstance(error, UsageError):
        return error
    return _refused(error.__context__)


def _refuse_without_effect(args: Any) -> None:
    """Refuses options that have no effect together with the others.

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
            condition = f"{word} {_option(other)} {value}".strip()
            remedy = "leave it out" if word == "with" else "give both or neither"
            raise UsageError(f"{_as_given(args, name)} has no effect {condition}: {remedy}")


def _given(args: Any, name: str) -> bool:
    """Whether a field, or one in a section (routing.images_per_group), differs from its default."""
    section, _, rest = name.partition(".")
    (default,) = (field.default for field in dataclasses.fields(args) if field.name == section)
    value = getattr(args, section)
    return value != default if not rest else getattr(value, rest) != getattr(default, rest)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _as_given(args: Any, name: str) -> str:
    """The option of a field, with its value."""
    value, option = operator.attrgetter(name)(args), _option(name)
    if isinstance(value, bool):
        return option if value else option.replace("--", "--no-", 1)
    if dataclasses.is_dataclass(value):
        return f"{option}.*"
    return f"{option} {' '.join(value) if isinstance(value, tuple) else value}".strip()


@dataclasses.dataclass(frozen=True)
class RunArgs:
    """Arguments of a command that takes a config; every field of the config is an option."""

    config: Path
    """Python file that defines `config = TrainConfig(...)`; config.json of a run; or the name of a
    file in configs/, such as digits."""
    run: Annotated[configs.TrainConfig, tyro.conf.arg(name="")]


WithConfig = TypeVar("WithConfig", bound=RunArgs)


def parse_with_config(kind: type[WithConfig], command: str, argv: Sequence[str]) -> WithConfig:
    """The arguments of a command that takes a config.

    ``--config`` names the file from which ``run`` is loaded; other options change fields of it. A
    length in steps, epochs or images replaces the length of the config.
    """
    options = given(argv)
    path = options.get("--config")
    config = configs.load(path) if path else configs.TrainConfig()
    for name in LENGTHS:
        if f"--{name}" in options:  # which replaces ANY_LENGTH
            config = configs.replace(config, **dict.fromkeys(LENGTHS) | {name: ANY_LENGTH})
    return parse(kind, command, argv, run=config)


def with_kinds(config: Any, argv: Sequence[str]) -> tuple[Any, list[str]]:
    """A config with the kinds that arguments name, and the arguments without lists of kinds.

    A field with several types, such as the router of an MoE layer, has the options of one of them,
    the type of the default. So ``--moe.router.kind soft`` makes a soft router the default.
    ``--moe.experts.each mlp zero`` makes a list of the default. The new default is not checked,
    since other options may change it.
    """
    for option, word in given(argv).items():
        if option.endswith(".kind") and word:
            config = _with_kind(config, option.removesuffix(".kind"), [word], option)
    used = set()
    for i, option in enumerate(argv):
        if option.endswith(".each"):
            kinds = list(itertools.takewhile(lambda word: not word.startswith("--"), argv[i + 1 :]))
            listed = _with_kind(config, option, kinds, option)
            if listed is not config:  # else it is for tyro to refuse
                config, used = listed, used | set(range(i, i + 1 + len(kinds)))
    return config, [word for i, word in enumerate(argv) if i not in used]


def _with_kind(config: Any, path: str, kinds: list[str], option: str) -> Any:
    """A config with the given kinds at a path; the same object if there is no such path."""
    name, _, inner = path.removeprefix("--").replace("-", "_").partition(".")
    if isinstance(config, tuple):
        if not name.isdigit() or int(name) >= len(config):
            return config  # for tyro to refuse
        i = int(name)
        value = _with_kind(config[i], inner, kinds, option)
        return config if value is config[i] else (*config[:i], value, *config[i + 1 :])
    if not hasattr(config, name):
        return config  # for tyro to refuse
    if inner:
        value = _with_kind(getattr(config, name), inner, kinds, option)
        if value is getattr(config, name):
            return config
    else:
        hint = typing.get_type_hints(type(config))[name]
        members = kinds_of(hint)
        own = getattr(config, name)
        if not members or not kinds or kinds == [getattr(own, "kind", None)]:
            return config
        if unknown := [kind for kind in kinds if kind not in members]:
            field = option.removeprefix("--").replace("-", "_")
            raise UsageError(choice(unknown[0], list(members)), **{field: unknown[0]})
        made = tuple(members[kind]() for kind in kinds)
        value = made if isinstance(own, tuple) else made[0]
    changed = copy.copy(config)
    object.__setattr__(changed, name, value)  # the config is frozen, and may be wrong for now
    return changed


def given(argv: Sequence[str]) -> dict[str, str | None]:
    """The options among arguments that are not parsed, and the word after each.

    >>> given(["--config", "a.py", "--batch_size=8", "--fsdp"])
    {'--config': 'a.py', '--batch-size': '8', '--fsdp': None}
    """
    options: dict[str, str | None] = {}
    for word, following in itertools.zip_longest(argv, argv[1:]):
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            options[name.replace("_", "-")] = value if equals else following
    return options


def options_of(fields: Iterable[str], argv: Sequence[str]) -> list[str]:
    """The given options that set the fields of an error.

    Errors name fields by their paths in a config. An option is the path of a field in the arguments
    of its command; if these hold only a part of a config, as in ``vmoe summary``, it is the end of
    the path. Options number the elements of a tuple, and ``no-`` sets a field to False.

    >>> options_of(["evaluations.image_size"], ["--evaluations.0.image-size", "9", "--seed", "1"])
    ['--evaluations.0.image-size']
    """
    paths = {
        option: re.sub(r"(?<=\.)(\d+\.|no_)", "", f".{option[2:].replace('-', '_')}")
        for option in given(argv)
    }
    named: list[str] = []
    for field in (f".{field}" for field in fields):
        near = [x for x, path in paths.items() if path.endswith(field) or field.endswith(path)]
        named += [option for option in near if paths[option] == field] or near
    return sorted({*named})


def remedies_of(remedies: Mapping[str, Any], kind: type) -> list[str]:
    """The options of the fields that errors name as remedies, with their values.

    Fields that the command has no option for are left out.

    Args:
        kind: the class of the command's arguments.

    >>> remedies_of({"batch_size": None, "model.remat": True, "on_nan": "rewind"}, RunArgs)
    ['--batch-size', '--model.remat']
    """
    names = {field.name for field in dataclasses.fields(kind)}
    config = configs.TrainConfig() if issubclass(kind, RunArgs) else None
    options = []
    for path, value in remedies.items():
        if path in names or _has(config, path):
            section, dot, name = path.rpartition(".")
            switch = "no-" * (value is False) + name
            word = "" if value is None or isinstance(value, bool) else f" {value}"
            options.append(f"--{section}{dot}{switch}".replace("_", "-") + word)
    return options


def _has(config: Any, path: str) -> bool:
    """Whether a config has a field that is no section."""
    for name in path.split("."):
        if not hasattr(config, name):
            return False
        config = getattr(config, name)
    return not dataclasses.is_dataclass(config)


def _one_line(box: str) -> str:
    """The text of an error of tyro, without its box, its hints and the errors of each type."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    text = " ".join(line for line in lines if line.strip("-"))  # dashes: the box in ASCII
    return re.split(" For full helptext| Argument helptext| Got errors:", text)[0]


def check_outputs(args: Any, *files: str, folders: Sequence[str] = ()) -> None:
    """Checks the paths of outputs before any work.

    Args:
        files: names of fields that hold the path of a file or None.
        folders: names of fields that hold the path of a folder or None.

    Raises:
        UsageError: a parent folder is missing, or the path is something else, such as /dev/null,
            which a file would replace.
    """
    for name in (*files, *folders):
        path, kind = getattr(args, name), "folder" if name in folders else "file"
        if path and not path.parent.is_dir():
            raise UsageError(f"no folder {path.parent}; make it first", **{name: path})
        if path and path.exists() and not (path.is_dir() if kind == "folder" else path.is_file()):
            raise UsageError(f"it is not a {kind}; give a {kind}", **{name: path})
