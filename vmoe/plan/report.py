"""What compilers of other machines made of a run's programs, as tables and as a dictionary."""

import collections
import dataclasses
import math
from typing import Any

from vmoe.errors import Failure
from vmoe.plan.compiled import REMEDY, Compiled, Report
from vmoe.plan.table import Row, format_bytes, format_flops, format_seconds

MEMORY = ("program", "arguments", "temporaries", "outputs", "code", "total", "left", "compiled in")
COMPARED = ("training step", "estimated", "compiled", "estimated / compiled")
COLLECTIVES = ("program", "collectives", "devices", "part", "sent by each")
FLOPS = ("program", "part", "traced", "compiled", "compiled / traced", "float32")

WITHIN = {"arguments": 0.02, "arguments and temporaries": 0.1}
"""By row of the comparison: the relative difference from which on it is marked."""


def heading(report: Report) -> list[str]:
    """The run in two lines, and what the figures are."""
    config, devices = report.config, report.placement.devices
    mesh = f"{report.placement}" + ", fsdp" * report.placement.fsdp
    return [
        f"{report.target.name}: {devices:,} devices as {mesh}, batches of {config.batch_size:,} "
        f"images of {config.model.image_size} px, {config.batch_size // devices:,} per device",
        "compiled by the machine's own compiler, not run; sizes are of one device",
    ]


def tables(report: Report) -> list[tuple[str, Row, list[Row]]]:
    """The tables of a report, in order: title, column names and rows of each."""
    result: list[tuple[str, Row, list[Row]]] = [
        ("Memory of a device", MEMORY, [_memory_row(report, each) for each in report.programs]),
        ("Estimated by vmoe plan, and compiled", COMPARED, _compared(report)),
    ]
    if any(program.collectives for program in report.programs):
        rows = [row for program in report.programs for row in _collective_rows(program)]
        result.append(("Messages, each with the part of its first array", COLLECTIVES, rows))
    rows = [row for program in report.programs for row in _flops_rows(program)]
    return [*result, ("FLOPs of products of matrices", FLOPS, rows)]


def notes(report: Report) -> list[str]:
    """What the tables cannot show."""
    lines = []
    for program in report.programs:
        parts = list(program.by_part())
        if program.estimated_seconds:
            seconds = format_seconds(program.estimated_seconds)
            lines.append(f"{program.name}: the compiler estimates {seconds}")
        lines += [
            f"{program.name}: {each.part} takes {each.compiled / each.counted:.1f} times the FLOPs "
            "of the traced program: small products are padded, or sparse ones made dense"
            for each in parts
            if each.expanded
        ]
        sent = collections.Counter(one.kind for _, _, one in program.collectives)
        beside = collections.Counter(x.kind for _, _, x in program.collectives if x.asynchronous)
        lines += [
            f"{program.name}: {beside[kind]} of {sent[kind]} messages by {kind} can travel while "
            "other operations run"
            for kind in sorted(beside)
        ]
        if math.isnan(parts[0].compiled):
            lines.append(
                f"{program.name}: products in loops whose length depends on data are not counted"
            )
    return lines


def check_fits(report: Report) -> None:
    """Raises a Failure for a program that needs more memory than a device has.

    The figure of a TPU is the published one, and its compiler has refused what does not fit.
    """
    memory = report.target.memory
    for program in report.programs:
        if memory is not None and program.total > memory and not report.target.refuses:
            raise Failure(
                f"{program.name}: it needs {format_bytes(program.total)} of a device's "
                f"{format_bytes(memory)}: {REMEDY}"
            )


def _memory_row(report: Report, program: Compiled) -> Row:
    memory = report.target.memory
    left = "" if memory is None else format_bytes(max(0.0, memory - program.total))
    parts = (program.arguments, program.temporaries, program.outputs, program.code, program.total)
    return (program.name, *map(format_bytes, parts), left, f"{program.seconds:,.0f} s")


def _compared(report: Report) -> list[Row]:
    """Our estimates of the training step beside the compiler's figures."""
    step, estimate = report.programs[0], report.estimate
    pairs = {
        "arguments": (estimate.arguments, step.arguments),
        "arguments and temporaries": (
            estimate.arguments + estimate.temporaries,
            step.arguments + step.temporaries,
        ),
    }
    return [
        (
            name,
            format_bytes(ours),
            format_bytes(theirs),
            f"{ours / theirs:.2f}" + " (!)" * (abs(ours / theirs - 1) > WITHIN[name]),
        )
        for name, (ours, theirs) in pairs.items()
    ]


def _collective_rows(program: Compiled) -> list[Row]:
    counts = collections.defaultdict[tuple[str, int, str], float](float)
    sent = collections.defaultdict[tuple[str, int, str], float](float)
    for part, executions, one in program.collectives:
        key = one.kind, len(one.replica_group), part
        counts[key] += executions
        sent[key] += executions * one.bytes_sent
    return [
        (program.name, f"{counts[key]:.0f} {kind}", str(devices), part, format_bytes(sent[key]))
        for key in sorted(counts, key=lambda key: -sent[key])
        for kind, devices, part in [key]
    ]


def _flops_rows(program: Compiled) -> list[Row]:
    return [
        (
            program.name,
            each.part,
            format_flops(each.counted),
            format_flops(each.compiled),
            f"{each.compiled / each.counted:.2f}" if each.counted else "",
            f"{each.float32 / each.compiled:.0%}" if each.compiled else "",
        )
        for each in program.by_part()
    ]


def to_dict(report: Report) -> dict[str, Any]:
    """The report without its config, for JSON; sizes in bytes, times in seconds."""
    return {
        "target": report.target.name,
        "devices": report.placement.devices,
        "mesh": str(report.placement),
        "fsdp": report.placement.fsdp,
        "device_memory": report.target.memory,
        "estimate": dataclasses.asdict(report.estimate)
        | {name: getattr(report.estimate, name) for name in ("arguments", "temporaries")},
        "programs": [_program_dict(program) for program in report.programs],
    }


def _program_dict(program: Compiled) -> dict[str, Any]:
    names = ("name", "seconds", "arguments", "outputs", "temporaries", "code", "total")
    return {name: getattr(program, name) for name in (*names, "estimated_seconds")} | {
        "parts": [each._asdict() | {"expanded": each.expanded} for each in program.by_part()],
        "collectives": [
            one._asdict() | {"part": part, "executions": executions}
            for part, executions, one in program.collectives
        ],
    }
