"""Writes docs/reference/commands.md: every command and option, from the real help texts.

python -m scripts.maintain.docs.reference
"""

import contextlib
import io
import os
import re
import textwrap
import typing
from collections.abc import Iterator
from typing import Any, NamedTuple

from vmoe.cli.main import GROUPS, main
from vmoe.config import Router, TrainConfig
from vmoe.config.experts import Expert
from vmoe.config.gates import Gate
from vmoe.config.rotary import Rotary
from vmoe.fields import LARGEST_COUNT, Bound, kinds

HEAD = """# Commands and options

Every command and option; `vmoe COMMAND --help all` prints the same in a terminal. `vmoe --version`
prints the version, and `--debug`, with any command, the traceback of an error. `./scripts/docs.sh`
generates this page from the help texts.
"""
CONFIG = """
## Options of a config

`vmoe train`, `vmoe plan` and `vmoe config` take each field of their config as an option:
`--optim.lr 1e-3` is `config.optim.lr`, `--evaluations.0.batch-size 64` is
`config.evaluations[0].batch_size`. The default values come from `TrainConfig()`, or from the file
that `--config FILE` gives. `vmoe config --config FILE` prints them.

There are several kinds of experts, gates, routers and rotary positions:

KINDS

`--model.moe.router.kind NAME` chooses a router, which has its own options:
`vmoe config --model.moe.router.kind NAME --help model.moe.router`. With
`--model.moe.experts.kind list --model.moe.experts.each mlp mlp zero` each expert has a kind.
"""
KINDS = {
    f"model.{path}": list(kinds(union))
    for path, union in {
        "moe.experts": Expert,
        "moe.gate": Gate,
        "moe.router": Router,
        "rotary": Rotary,
    }.items()
}
"""The kinds of fields with several types, the default first; each has its own options."""
WITHOUT_DEFAULT = {"model.moe": "model.moe.gate", "model": "model.rotary"}
"""Sections after which the kinds of a field follow that is None by default."""
ABOUT = {"evaluations.0": "The first evaluation set; 1, 2, ... for others in the config file."}
"""Sections about which the help text has no line."""
COLUMNS = 100  # of a line


class Option(NamedTuple):
    names: str
    """Names with the kind of value, such as "--seed INT"."""
    default: str
    meaning: str


class Section(NamedTuple):
    title: str
    about: str
    options: list[Option]


def page() -> str:
    """The page as Markdown."""
    lines = [HEAD]
    commands = {name: text for group in GROUPS.values() for name, text in group.items()}
    lines += [f"- [`vmoe {name}`](#vmoe-{name}): {text}" for name, text in commands.items()]
    of_config = sections_of(help_of("config"))
    common = {each for section in of_config for each in section.options}
    common -= {each for each in common if each.names.startswith("--config")}
    for name in commands:
        text = help_of(name)
        usage, _, about = text.partition("╭─")[0].strip().partition("\n\n")
        lines += [f"\n## vmoe {name}\n", about, f"\n`{usage.partition(': ')[2]}`"]
        own: list[Any] = []
        sections = sections_of(text)
        for section in sections:
            if own := [option for option in section.options if option not in common]:
                lines += _table(section._replace(options=own))
        if len(own) < len(sections[-1].options):
            lines.append("\nAlso the [options of a config](#options-of-a-config).")
    shown = (f"- `{path}.kind`: {', '.join(map(_code, each))}" for path, each in KINDS.items())
    lines.append(CONFIG.replace("KINDS", "\n".join(shown)))
    limits = dict(_limits(TrainConfig))
    for section in of_config:
        lines += _table(
            section._replace(options=[each for each in section.options if each in common]), limits
        )
        for path, known in KINDS.items():
            if section.title == f"{path} options":
                lines += [line for kind in known[1:] for line in _kind(path, kind, limits)]
        if path := WITHOUT_DEFAULT.get(section.title.removesuffix(" options")):
            lines += [line for kind in KINDS[path] for line in _kind(path, kind, limits)]
    return "\n".join(map(_wrapped, "\n".join(lines).split("\n")))


def _wrapped(line: str) -> str:
    """A line, in several if it is wide and of no table."""
    if len(line) <= COLUMNS or line.startswith("|"):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, COLUMNS, subsequent_indent=indent, break_on_hyphens=False)


def _code(word: str) -> str:
    return f"`{word}`"


def _kind(path: str, kind: str, limits: dict[str, str]) -> Iterator[str]:
    """The tables of the options of a kind other than the default."""
    sections = sections_of(help_of("config", f"--{path}.kind", kind))
    for section in sections:
        if section.title == f"{path} options":
            yield from _table(section._replace(title=f"{path}.kind {kind} options"), limits)
        elif section.title.startswith(f"{path}."):
            name = section.title.removesuffix(" options")
            yield from _table(section._replace(title=f"{name} with kind {kind} options"), limits)


def help_of(command: str, *options: str) -> str:
    """The help text of a command, with lines too short for two columns of boxes."""
    os.environ["COLUMNS"] = "120"
    text = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # so that the boxes are drawn
    with contextlib.redirect_stdout(text):
        main([command, *options, "--help", "all"])
    text.seek(0)
    return text.read()


def sections_of(help_text: str) -> list[Section]:
    """The boxes of a help text."""
    sections = []
    for box in re.split(r"^╭─ ", help_text, flags=re.MULTILINE)[1:]:
        title, *rows = box.splitlines()
        rows = [row.strip("│").rstrip()[1:] for row in rows if row.startswith("│")]
        about, options = list[str](), list[list[str]]()
        for row in rows:
            if row.startswith(" ") and options:
                options[-1][1] += f" {row.strip()}"
            elif options and options[-1][0].count("{") > options[-1][0].count("}"):
                options[-1][0] += row  # the choices take several lines
            elif re.match(r"-|\[?[A-Z]+\b(?! [a-z])", row):
                names, _, text = row.partition("  ")
                options.append([names, text])
            elif not row.startswith("─"):
                about.append(row.strip())
        found = [_option(*option) for option in options if not option[0].startswith("-h")]
        sections.append(Section(title.partition(" ─")[0], " ".join(filter(None, about)), found))
    return sections


def _option(names: str, text: str) -> Option:
    names = re.sub(r"\{None\}\|(.*)", r"\1 or None", names)
    match = re.fullmatch(r"(.*?)\s*\((?:default: (.*)|(required))\)", text.strip(), re.DOTALL)
    return Option(names, match[2] or match[3] or "", match[1]) if match else Option(names, "", text)


def _table(section: Section, limits: dict[str, str] | None = None) -> Iterator[str]:
    if section.title not in ("options", "positional arguments"):
        about = section.about or ABOUT.get(section.title.partition(" ")[0], "")
        yield f"\n**{section.title.removesuffix(' options')}**: {about}".rstrip(": ")
    kind = "argument" if section.title.startswith("positional") else "option"
    columns = [kind, "default", *["limits"] * (limits is not None), "meaning"]
    yield f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for option in section.options:
        default = option.default if option.default in ("", "required") else f"`{option.default}`"
        cells = [f"`{option.names}`", default, option.meaning]
        if limits is not None:
            path = option.names.split()[0].strip(",-").replace("-", "_").replace(".no_", ".")
            cells.insert(2, limits.get(re.sub(r"\.\d+", "", path), ""))
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _limits(kind: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """The bounds of the fields of a config, by the paths of the fields."""
    for name, annotated in typing.get_type_hints(kind, include_extras=True).items():
        bounds = dict.fromkeys(_found(annotated, Bound))
        remedies = [bound.remedy.removeprefix("use ") for bound in bounds]
        yield path + name, ", ".join(text for text in remedies if str(LARGEST_COUNT) not in text)
        types = dict.fromkeys(_found(annotated, type))
        for inner in [each for kind in types for each in (kind, *kinds(kind).values())]:
            if hasattr(inner, "__dataclass_fields__"):
                yield from _limits(inner, f"{path}{name}.")


def _found(annotated: Any, kind: type) -> Iterator[Any]:
    """The values of a kind anywhere in an annotated type."""
    if isinstance(annotated, kind):
        yield annotated
    metadata = getattr(annotated, "__metadata__", ())
    for inner in (*typing.get_args(annotated), *metadata):
        yield from _found(inner, kind)


if __name__ == "__main__":
    print(page())
