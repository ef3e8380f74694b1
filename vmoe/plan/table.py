"""A plan for readers: its rows, and in words what it rests on."""

import dataclasses
from typing import Any

from vmoe.costs.chips import CHIPS
from vmoe.plan.candidates import UTILISATION, Candidate, Exchange, Plan

MEMORY = (
    *("mesh", "parameters", "gradients", "optimiser", "activations", "all"),
    *("activations\nwith remat", "all\nwith remat"),
)
TIME = ("mesh", "sends", "compute", "update", "messages", "step", "images/s")
EXCHANGES = ("piece", "times", "collectives", "devices", "sends, each", "sends in all", "takes")

FLOAT32 = 4  # bytes; all parameters are
Row = tuple[str, ...]


def tables(plan: Plan) -> list[tuple[str, Row, list[Row]]]:
    """Titles, columns and rows, in the order in which they are read."""
    best = plan.fit[0]
    room = f"A device of {_bytes(plan.device_memory)} holds"
    chosen = "with" if plan.config.model.remat else "without"
    found = [
        (f"{room} (it counts {chosen} remat, as the config)", MEMORY, list(map(_memory, plan.fit))),
        ("A step takes", TIME, [_time(plan, option) for option in plan.fit]),
    ]
    if plan.others:
        found.insert(
            1, ("And would need, too much for it", MEMORY, list(map(_memory, plan.others)))
        )
    if best.exchanges:
        title = f"A device sends, with {_name(best)} (and less than 0.01% of it in small messages)"
        shown = [one for one in best.exchanges if one.sent * one.times >= best.sent / 1e4]
        found.append((title, EXCHANGES, list(map(_exchange, shown))))
    return found


def _memory(option: Candidate) -> Row:
    memory = option.memory
    always = memory.state + memory.gradients
    parts = (
        *(memory.parameters, memory.gradients, memory.optimizer + memory.average),
        *(memory.kept, always + memory.kept),
        *(memory.kept_with_remat, always + memory.kept_with_remat),
    )
    return _name(option), *(_bytes(float(part)) for part in parts)


def _time(plan: Plan, option: Candidate) -> Row:
    parts = (option.compute, option.update, option.exchange, option.seconds)
    speed = plan.config.batch_size / option.seconds
    return _name(option), _bytes(float(option.sent)), *map(_seconds, parts), f"{speed:,.0f}"


def _exchange(exchange: Exchange) -> Row:
    return (
        exchange.piece,
        str(exchange.times),
        f"{exchange.count} {exchange.kind}",
        str(exchange.group),
        _bytes(exchange.sent),
        _bytes(exchange.sent * exchange.times),
        _seconds(exchange.seconds * exchange.times),
    )


def _bytes(amount: float) -> str:
    """In the unit that suits it.

    >>> _bytes(5.16e9), _bytes(320.0)
    ('5.16 GB', '320 B')
    """
    return _scaled(amount, {1e9: "GB", 1e6: "MB", 1e3: "kB", 1.0: "B"})


def _seconds(amount: float) -> str:
    return _scaled(amount, {1.0: "s", 1e-3: "ms", 1e-6: "µs"})


def _scaled(amount: float, units: dict[float, str]) -> str:
    """With three digits, in the largest unit of which there is a whole one."""
    size = next((size for size in units if amount >= size), min(units))
    digits = max(0, 3 - len(f"{amount / size:.0f}"))
    return f"{amount / size:,.{digits}f} {units[size]}"


def _name(option: Candidate) -> str:
    return option.mesh + ", fsdp" * option.fsdp


def heading(plan: Plan) -> list[str]:
    """The run in a few lines."""
    model, share = plan.config.model, plan.fit[0].memory.parameters // FLOAT32
    flops = _scaled(
        float(plan.flops), {1e15: "PFLOPs", 1e12: "TFLOPs", 1e9: "GFLOPs", 1e6: "MFLOPs"}
    )
    again = ", and forward once more (remat)" if model.remat else ""
    return [
        f"{plan.devices} {plan.chip}, batches of {plan.config.batch_size:,} images of "
        f"{model.image_size} px, {plan.config.batch_size // plan.devices:,} a device",
        f"{plan.parameters:,} parameters, {plan.active_parameters:,.0f} active per token, "
        f"{share:,} on a device with {_name(plan.fit[0])}",
        f"{flops} a step: matrix products, forward and backward{again}",
    ]


def assumptions(plan: Plan) -> list[str]:
    """What the figures rest on, and what they leave out."""
    chip, model = CHIPS[plan.chip], plan.config.model
    between = "" if chip.network is None else f", {chip.network / 1e9:.4g} GB/s between them"
    float32 = "" if model.dtype == "bfloat16" else ", and this model's float32 is slower"
    rows = {model.moe_of(block).transfer_dtype for block in model.sparse_blocks}
    average = "; the moving average counts as optimiser" if plan.config.ema_decay else ""
    wire = f"; rows travel to experts and back as {' or '.join(sorted(rows))}" if rows else ""
    return [
        f"memory: what is kept, added up; buffers that come and go are not in it{average}",
        f"compute: {UTILISATION:.0%} of the peak of {chip.peak / 1e12:.4g} TFLOP/s, an assumption; "
        f"the peak is of bfloat16{float32}",
        f"update: state and gradients read and written once, {chip.memory_bandwidth / 1e9:,.0f} "
        "GB/s",
        "messages: as compiled for this many virtual devices, in the types that the config "
        f"gives{wire}; without sums of numbers (norms, metrics)",
        "messages: each sent on a ring, one after the other, while nothing is computed: of S bytes "
        "on n devices all-to-all and reduce-scatter send S (n-1)/n, all-reduce twice as much, "
        "all-gather S (n-1)",
        f"messages: {chip.link / 1e9:.4g} GB/s in islands of {chip.island:,} devices (hosts, or "
        f"pods){between}; devices are numbered island by island",
        f"experts over more than {chip.island:,} devices leave their island; `vmoe train` does so "
        "with --mesh alone",
        "fsdp: accelerators may send half of an all-reduce of which each device keeps a part",
    ]


def figures(plan: Plan) -> dict[str, Any]:
    """All of the plan for machines: bytes and seconds."""

    def of(option: Candidate) -> dict[str, Any]:
        sums = {"sent": option.sent, "messages": option.exchange, "seconds": option.seconds}
        memory = dataclasses.asdict(option.memory) | {"total": option.memory.total}
        return dataclasses.asdict(option) | {"memory": memory} | (sums if option.exchanges else {})

    found = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    del found["config"]
    options = {"fit": list(map(of, plan.fit)), "others": list(map(of, plan.others))}
    return found | options | {"assumptions": assumptions(plan)}
