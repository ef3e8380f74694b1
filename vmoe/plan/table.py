"""A plan as tables, as sentences about its assumptions, and as a dictionary for JSON."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vmoe.costs.chips import CHIPS
from vmoe.plan.candidates import UTILIZATION, Candidate, Plan

MEMORY = (
    *("mesh", "parameters", "batch", "gradients", "optimizer", "activations", "total"),
    "total\n(remat)",
)
TIME = ("mesh", "sent", "compute", "update", "communication", "step", "images/s")
COMMUNICATION = ("segment", "times", "collectives", "devices", "sent, each", "sent, total", "time")

LISTED = 5  # meshes in a table; JSON has all

STEP = ("bytes_sent", "communication_seconds", "step_seconds")  # in JSON, of feasible candidates

Row = tuple[str, ...]
_FLOAT32 = 4  # bytes; all parameters are float32


def heading(plan: Plan) -> list[str]:
    """The run in three lines: devices and batch, parameters, FLOPs."""
    model, batch_size = plan.config.model, plan.config.batch_size
    best, parts = plan.feasible[0], plan.config.accumulate
    in_parts = f" in {parts} parts" if parts > 1 else ""
    remat = ", and the forward pass again (remat)" if model.remat else ""
    return [
        f"{plan.devices:,} {plan.chip}, batches of {batch_size:,} images of {model.image_size} px, "
        f"{batch_size // plan.devices:,} per device{in_parts}",
        f"{plan.parameters:,} parameters, {plan.active_parameters:,.0f} active per token, "
        f"{best.memory.parameters // _FLOAT32:,} per device with {_name(best)}",
        f"{format_flops(float(plan.flops))} per step: matmuls, forward and backward{remat}",
    ]


def tables(plan: Plan) -> list[tuple[str, Row, list[Row]]]:
    """The tables of a plan, in order: title, column names and rows of each."""
    best, limit = plan.feasible[0], format_bytes(plan.device_memory)
    remat = "with" if plan.config.model.remat else "without"
    listed, smallest = plan.feasible[:LISTED], plan.infeasible[:LISTED]
    title = f"Memory per device; feasible up to {limit}, counted {remat} remat as in the config"
    result: list[tuple[str, Row, list[Row]]] = [
        (title + _of(listed, plan.feasible, "fastest"), MEMORY, list(map(_memory_row, listed)))
    ]
    if smallest:
        title = f"Infeasible: more than {limit} per device"
        title += _of(smallest, plan.infeasible, "smallest")
        result.append((title, MEMORY, list(map(_memory_row, smallest))))
    title = "Time of a step" + _of(listed, plan.feasible, "fastest")
    result.append((title, TIME, [_time_row(plan, c) for c in listed]))
    if best.communications:
        title = (
            f"Communication per device and step with {_name(best)} (rows below 0.01% of the bytes "
            "are left out)"
        )
        rows: list[Row] = [
            (
                one.segment,
                str(one.times),
                f"{one.count} {one.kind}",
                str(one.group_size),
                format_bytes(one.bytes_sent),
                format_bytes(one.total_bytes_sent),
                format_seconds(one.total_seconds),
            )
            for one in best.communications
            if one.total_bytes_sent >= best.bytes_sent / 1e4
        ]
        result.append((title, COMMUNICATION, rows))
    return result


def _of(listed: Sequence[Candidate], every: Sequence[Candidate], which: str) -> str:
    """The end of the title of a table that does not list every mesh."""
    return (
        "" if len(listed) == len(every) else f"\nThe {len(listed)} {which} of {len(every)} meshes"
    )


def _memory_row(candidate: Candidate) -> Row:
    memory = candidate.memory
    parts = (
        *(memory.parameters, memory.batch + memory.pixels, memory.gradients + memory.gradient_sum),
        memory.opt_state + memory.ema + memory.gathered,
        memory.saved_activations + memory.working,
        *(memory.arguments + memory.temporaries_with(remat=remat) for remat in (False, True)),
    )
    return _name(candidate), *(format_bytes(float(part)) for part in parts)


def _time_row(plan: Plan, candidate: Candidate) -> Row:
    parts = (
        *(candidate.compute_seconds, candidate.update_seconds),
        *(candidate.communication_seconds, candidate.step_seconds),
    )
    return (
        _name(candidate),
        format_bytes(candidate.bytes_sent),
        *map(format_seconds, parts),
        f"{plan.config.batch_size / candidate.step_seconds:,.0f}",
    )


def _name(candidate: Candidate) -> str:
    return candidate.mesh + ", fsdp" * candidate.fsdp


def assumptions(plan: Plan) -> list[str]:
    """The assumptions and omissions of the estimates."""
    chip, model = CHIPS[plan.chip], plan.config.model
    network = chip.network_bandwidth
    between = "" if network is None else f", {network / 1e9:.4g} GB/s between domains"
    float32 = "" if model.dtype == "bfloat16" else ", and this model's float32 is slower"
    dtypes = {moe.exchange.dtype for moe in model.moe_blocks.values()}
    transfer = f" (rows to and from experts: {' or '.join(sorted(dtypes))})" if dtypes else ""
    ema = "; the moving average counts as optimizer" if plan.config.ema_decay else ""
    fsdp = any(each.fsdp for each in plan.feasible + plan.infeasible)
    gathered = "; with fsdp, new experts beside the old ones count as optimizer" if fsdp else ""
    accumulate = (
        "accumulate: the batch is held in float32 as well, and the sum of the gradients besides a "
        "part's activations; gradients of a part and their sum are read and written once per part; "
        "all collectives, also of the update, are counted once per part"
    )
    frozen = "frozen parts: their saved activations and the backward pass through them are counted"
    return [
        "memory: state, batch, and the larger of gradients and saved activations, which are freed "
        "while gradients are made; activations include what the backward pass of one block needs; "
        "without buffers of collectives" + ema + gathered,
        f"compute: {UTILIZATION:.0%} of the peak of {chip.peak_flops / 1e12:.4g} TFLOP/s, an "
        f"assumption; the peak is for bfloat16{float32}",
        "update: state and gradients are read and written once at "
        f"{chip.memory_bandwidth / 1e9:,.0f} GB/s",
        "communication: the collectives of the program compiled for this many devices, in the "
        f"dtypes of the config{transfer}, without reductions to scalars (norms, metrics)",
        "communication: collectives run on rings, one after another, and do not overlap with "
        "compute; for S bytes on n devices all-to-all and reduce-scatter send S (n-1)/n, "
        "all-reduce sends twice as much, all-gather S (n-1)",
        f"communication: {chip.link_bandwidth / 1e9:.4g} GB/s within an NVLink/ICI domain of "
        f"{chip.domain_size:,} devices (a host or a pod){between}; devices are numbered domain by "
        "domain",
        f"mesh: experts on more than {chip.domain_size:,} devices span several domains; training "
        "uses such a mesh only if it is given",
        "fsdp: if each device keeps only a part of an all-reduce, accelerators may run it as a "
        "reduce-scatter, which sends half",
        *([accumulate] if plan.config.accumulate > 1 else []),
        *([frozen] if 0 in dataclasses.astuple(plan.config.optim.lr_factors) else []),
    ]


def to_dict(plan: Plan) -> dict[str, Any]:
    """The plan without its config, for JSON; sizes in bytes, times in seconds."""
    fields = {f.name: getattr(plan, f.name) for f in dataclasses.fields(plan) if f.name != "config"}
    return fields | {
        "feasible": [
            _candidate_dict(c) | {name: getattr(c, name) for name in STEP} for c in plan.feasible
        ],
        "infeasible": [_candidate_dict(c) for c in plan.infeasible],
        "assumptions": assumptions(plan),
    }


def _candidate_dict(candidate: Candidate) -> dict[str, Any]:
    total = {"total": candidate.memory.total}
    return dataclasses.asdict(candidate) | {"memory": dataclasses.asdict(candidate.memory) | total}


def format_bytes(amount: float) -> str:
    """Bytes in a decimal unit.

    >>> format_bytes(5.16e9), format_bytes(320.0)
    ('5.16 GB', '320 B')
    """
    return _format(amount, {1e9: "GB", 1e6: "MB", 1e3: "kB", 1.0: "B"})


def format_seconds(amount: float) -> str:
    """Seconds, as s, ms or µs.

    >>> format_seconds(0.0123)
    '12.3 ms'
    """
    return _format(amount, {1.0: "s", 1e-3: "ms", 1e-6: "µs"})


def format_flops(amount: float) -> str:
    """FLOPs in a decimal unit.

    >>> format_flops(1.41e16)
    '14.1 PFLOPs'
    """
    return _format(amount, {1e15: "PFLOPs", 1e12: "TFLOPs", 1e9: "GFLOPs", 1e6: "MFLOPs"})


def _format(amount: float, units: dict[float, str]) -> str:
    """Formats in the largest unit that gives at least 1, else in the smallest; units descend."""
    size = next((size for size in units if amount >= size), min(units))
    digits = max(0, 3 - len(f"{amount / size:.0f}"))
    return f"{amount / size:,.{digits}f} {units[size]}"
