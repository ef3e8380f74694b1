"""Compiles the published models for TPUs and GPUs, without one: docs/results/compiled.md.

    pip install -e '.[compilers]'
    python -m scripts.experiments compiled --jobs 1    # compiles what is missing; prints
    python -m scripts.experiments results              # then writes docs/results

    step_MODEL_MACHINE       the training step of a run
    forward_MODEL_MACHINE    the forward pass of an evaluation
    HOW_MODEL_MACHINE        the training step, by how slots or rows are sent to the experts

What `vmoe plan --compile` reads in a program is a line of scripts/experiments/rows/compiled.jsonl.
A program with such a line is not compiled again: remove the line if the program has changed. One
takes 2 to 15 minutes of a core. ``--tiny`` compiles a small model for the same machines.
"""

import argparse
import importlib.metadata
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import flax
import jax

from scripts.experiments.framework.figures import Part, figures_parser, measured
from scripts.experiments.framework.pages import answer_of, markdown_table, sections_of
from scripts.experiments.framework.runs import Rows
from vmoe.config import load, replace
from vmoe.errors import Failure
from vmoe.plan.compiled import compile_run
from vmoe.plan.report import to_dict
from vmoe.plan.table import format_bytes, format_flops
from vmoe.plan.targets import target

CONFIGS = {
    "s32": "imagenet1k_s32_light",
    "b16": "imagenet21k_b16",
    "l16": "jft_l16",
    "h14": "jft_h14",
    "15b": "vmoe_15b",
}
NAMES = {"s32": "S/32", "b16": "B/16", "l16": "L/16", "h14": "H/14", "15b": "15B"}
PROGRAMS = {"step": "training step", "forward": "forward pass"}


class Case(NamedTuple):
    """A program of a run in bfloat16.

    Attributes:
        program: its name in ``PROGRAMS``.
        model: its name in ``CONFIGS``.
        machine: as of ``vmoe plan --compile``.
        batch_size: images of all devices.
        remat: whether blocks are computed again in the backward pass.
        fsdp, mesh: see ``vmoe.mesh.place``.
        how: of ``SENDING``; the head then reads all tokens, so that none is left out of the last
            sparse block.
    """

    program: str
    model: str
    machine: str
    batch_size: int
    remat: bool = False
    fsdp: bool = False
    mesh: str = ""
    how: str = ""

    @property
    def name(self) -> str:
        return f"{self.how or self.program}_{self.model}_{self.machine.replace(':', '_')}"


CASES = (
    Case("forward", "s32", "tpu:v5e:1x1", 256),
    Case("forward", "s32", "gpu:h100", 256),
    Case("forward", "b16", "tpu:v5e:1x1", 64),
    Case("forward", "b16", "gpu:h100", 64),
    Case("step", "s32", "tpu:v5e:1x1", 512),
    Case("step", "s32", "tpu:v5e:2x4", 8_192, mesh="expert=4"),
    Case("step", "s32", "gpu:h100", 1_024),
    Case("step", "s32", "gpu:h100:8", 8_192),
    Case("step", "b16", "tpu:v5e:2x4", 512, mesh="expert=4"),
    Case("step", "b16", "tpu:v5e:4x8", 4_096, mesh="expert=4"),
    Case("step", "b16", "gpu:h100", 256),
    Case("step", "b16", "gpu:h100:8", 4_096),
    Case("forward", "l16", "tpu:v5e:2x4", 256, mesh="expert=4"),
    Case("step", "l16", "tpu:v5e:4x8", 4_096, remat=True, fsdp=True, mesh="expert=4"),
    Case("step", "l16", "tpu:v4:2x2x4", 1_024, remat=True, fsdp=True, mesh="expert=4"),
    Case("step", "l16", "gpu:h100:8", 1_024, remat=True),
    Case("forward", "h14", "tpu:v5e:2x4", 64, mesh="expert=4"),
    Case("step", "h14", "tpu:v5e:4x8", 1_024, remat=True, fsdp=True, mesh="expert=16"),
    Case("step", "h14", "gpu:h100:8", 512, remat=True),
    Case("step", "15b", "tpu:v5e:16x16", 2_048, remat=True, fsdp=True, mesh="expert=32"),
)
"""The forward pass on one device, where the parameters fit on one; the step on few devices and on
more."""
DROPLESS = dict(router=dict(dropless=True))
SENDING: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "slots": ("slots", {}),
    "slots_parts": ("slots, `chunks 2`", dict(exchange=dict(chunks=2))),
    "slots_async": ("slots, `chunks 2`, asynchronous", dict(exchange=dict(chunks=2))),
    "slots_levels": ("slots, `--mesh expert=2x4`", {}),
    "rows": ("rows: `router.dropless`", DROPLESS),
    "rows_parts": ("rows, `chunks 2`", DROPLESS | dict(exchange=dict(chunks=2))),
    "rows_async": (
        "rows, `chunks 2`, asynchronous",
        DROPLESS | dict(exchange=dict(chunks=2)),
    ),
    "rows_levels": ("rows, `--mesh expert=2x4`", DROPLESS),
    "rows_bound": ("rows, `buffer-factor 2`", DROPLESS | dict(exchange=dict(buffer_factor=2.0))),
    "rows_hot": (
        "rows, `buffer-factor 2`, `hot-experts 4`",
        DROPLESS | dict(exchange=dict(buffer_factor=2.0, hot_experts=4)),
    ),
    "rows_ragged": (
        "rows, `buffer-factor 2`, `ragged`",
        DROPLESS | dict(exchange=dict(buffer_factor=2.0, ragged=True)),
    ),
}
"""How slots or rows are sent: a title, with the options of ``--model.moe``, and their fields."""
SENT_CASES = tuple(
    Case("step", model, machine, batch_size, mesh=mesh, how=how)
    for model, machine, batch_size in (("s32", "tpu:v5e:2x4", 512), ("b16", "tpu:v5e:4x8", 1_024))
    for how in SENDING
    for mesh in ["expert=2x4" if "levels" in how else "expert=4"]
)
COLUMNS = (
    *("program", "model", "machine", "mesh", "images per device", "arguments", "estimated"),
    *("with temporaries", "estimated", "collectives", "sent by each", "FLOPs"),
    *("of those traced", "float32", "compiler"),
)


def figures(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """What is read in the program, or why its compiler refuses it."""
    overlap = "--xla_tpu_enable_async_all_to_all=true"
    os.environ["LIBTPU_INIT_ARGS"] = overlap if case.how.endswith("async") else ""
    machine = target(case.machine)  # before JAX starts
    tiny = options.size == "tiny"
    config = load("tiny" if tiny else CONFIGS[case.model])
    model: dict[str, Any] = dict(dtype="bfloat16", remat=case.remat)
    if case.how:
        moe = dict(SENDING[case.how][1])
        moe |= dict(exchange=dict(dtype="bfloat16") | moe.get("exchange", {}))
        model |= dict(pooling="mean", moe=moe)
    batch_size = 4 * len(machine.devices) if tiny else case.batch_size
    config = replace(config, batch_size=batch_size, model=model)
    packages = {"tpu": "libtpu", "gpu": "jax-cuda12-plugin"}
    package = packages[case.machine.partition(":")[0]]
    compiler = {"compiler": f"{package} {importlib.metadata.version(package)}"}
    fsdp = case.fsdp and not tiny
    try:
        report = compile_run(
            config,
            machine,
            mesh="" if tiny else case.mesh,
            fsdp=fsdp,
            programs=[PROGRAMS[case.program]],
        )
    except Failure as error:
        return compiler | {"batch_size": config.batch_size, "refused": str(error)}
    return compiler | {"batch_size": config.batch_size} | to_dict(report)


PARTS = {
    case.name: Part(1, lambda options, seed, case=case: figures(case, options))
    for case in CASES + SENT_CASES
}


SENT_COLUMNS = (
    *("sent", "model", "machine", "mesh", "with temporaries", "estimated", "collectives"),
    *("all-to-alls that are asynchronous", "sent by each"),
)


def table(rows: Rows) -> str:
    """A line for each program that was compiled."""

    def cells(case: Case, found: dict[str, Any], program: dict[str, Any]) -> list[str]:
        whole, step = program["parts"][0], case.program == "step"
        arguments = found["estimate"]["arguments"] / program["arguments"]
        return [
            found["mesh"] + ", remat" * case.remat,
            f"{found['batch_size'] // found['devices']:,}",
            format_bytes(program["arguments"]),
            f"{arguments:.2f}" if step else "",
            format_bytes(_both(program)),
            _estimated(found, program) if step else "",
            _collectives(program),
            _sent(program),
            _known(whole["compiled"], format_flops(whole["compiled"])),
            _known(whole["compiled"], f"{whole['compiled'] / whole['counted']:.2f}"),
            _known(whole["compiled"], f"{whole['float32'] / whole['compiled']:.1%}"),
            found["compiler"],
        ]

    def first(case: Case) -> str:
        return PROGRAMS[case.program]

    return markdown_table(COLUMNS, _lines(rows, CASES, len(COLUMNS), first, cells))


def sent_table(rows: Rows) -> str:
    """A line for each way to send slots or rows whose program was compiled."""

    def cells(case: Case, found: dict[str, Any], program: dict[str, Any]) -> list[str]:
        exchanges = [x for x in program["collectives"] if x["kind"].endswith("all-to-all")]
        return [
            found["mesh"],
            format_bytes(_both(program)),
            _estimated(found, program),
            _collectives(program),
            f"{sum(each['asynchronous'] for each in exchanges)} of {len(exchanges)}",
            _sent(program),
        ]

    def first(case: Case) -> str:
        return SENDING[case.how][0]

    return markdown_table(SENT_COLUMNS, _lines(rows, SENT_CASES, len(SENT_COLUMNS), first, cells))


def _lines(
    rows: Rows,
    cases: Sequence[Case],
    columns: int,
    first: Callable[[Case], str],
    cells: Callable[[Case, dict[str, Any], dict[str, Any]], list[str]],
) -> Iterator[list[str]]:
    """The lines of the cases that were compiled, or why the compiler refuses them.

    Args:
        first: the first cell, before model and machine.
        cells: those after the machine, of a case, its figures and its program.
    """
    for case in cases:
        for row in rows.get(case.name, {}).values():
            found = row["figures"]
            begin = [first(case), NAMES[case.model], f"`{case.machine}`"]
            if "refused" in found:
                yield [*begin, found["refused"], *[""] * (columns - 4)]
            else:
                yield [*begin, *cells(case, found, found["programs"][0])]


def _both(program: dict[str, Any]) -> int:
    return program["arguments"] + program["temporaries"]


def _estimated(found: dict[str, Any], program: dict[str, Any]) -> str:
    """The estimate of both, relative to the compiler's."""
    estimate = found["estimate"]
    return f"{(estimate['arguments'] + estimate['temporaries']) / _both(program):.2f}"


def _sent(program: dict[str, Any]) -> str:
    sent = sum(each["executions"] * each["bytes_sent"] for each in program["collectives"])
    return _known(sent, format_bytes(sent))


def _known(value: float, text: str) -> str:
    """The text of a value that does not depend on a loop whose length is not known."""
    return "unknown" if math.isnan(value) else text


def _collectives(program: dict[str, Any]) -> str:
    counts: dict[str, float] = {}
    for each in program["collectives"]:
        counts[each["kind"]] = counts.get(each["kind"], 0.0) + each["executions"]
    texts = {kind: _known(count, f"{count:.0f}") for kind, count in sorted(counts.items())}
    return ", ".join(f"{text} {kind}" for kind, text in texts.items()) or "none"


def answer(rows: Rows) -> str:
    """How many programs the compilers make, and whether any computes its experts densely."""
    every = [row["figures"] for case in CASES for row in rows.get(case.name, {}).values()]
    programs = [each["programs"][0] for each in every if "programs" in each]
    if not programs:
        return answer_of([None])
    parts = [part for program in programs for part in program["parts"]]
    experts = [part for part in parts if part["part"] == "experts"]
    known = [part for part in experts if not math.isnan(part["compiled"])]
    which = "some have" if any(part["expanded"] for part in known) else "none has"
    if len(known) < len(experts):
        which = f"of the {len(known)} whose FLOPs are known, {which}"
    ratios = [part["compiled"] / part["counted"] for part in parts if part["part"] == "all"]
    ratios = [each for each in ratios if not math.isnan(each)]
    text = (
        f"the compilers make {len(programs)} of {len(every)} programs; {which} a dense expansion "
        "of the experts"
    )
    return answer_of([(text, f"FLOPs, compiled to traced: {min(ratios):.2f} to {max(ratios):.2f}")])


TABLES = {
    "programs": ("What the compilers made of each program", table),
    "sent": ("The training step, by how slots or rows are sent", sent_table),
}


def sections(rows: Rows, machine: str) -> dict[str, str]:
    """The generated sections of the page."""
    found = sections_of("compiled", TABLES, rows, answer(rows), machine)
    compilers = {row["figures"]["compiler"] for of in rows.values() for row in of.values()}
    return found | {"how": f"{found['how']}\n\nCompilers: {', '.join(sorted(compilers))}."}


def main(arguments: Sequence[str]) -> None:
    parser = figures_parser("compiled", __doc__, PARTS)
    measured(parser.parse_args(arguments), PARTS, (flax, jax), TABLES)
