"""What a run needs and how long a step takes, on devices that are not here.

    memory      parameters, gradients, optimiser: exact, from the shapes and where they lie;
                activations: the residuals of the program
    FLOPs       of the matrix products of a step, counted in its program
    messages    bytes that each collective sends, read from the program compiled for virtual devices
    step time   an estimate out of what a chip's maker publishes and assumptions that are printed

Nothing is allocated and nothing is run. Whatever repeats is looked at once (``pieces.py``).
"""

import collections
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax

from vmoe.config import TrainConfig
from vmoe.costs.chips import CHIPS, Chip
from vmoe.costs.collectives import Collective
from vmoe.costs.flops import cost
from vmoe.errors import Failure, UsageError, unknown
from vmoe.mesh import place
from vmoe.plan.memory import Memory, memory
from vmoe.plan.segments import Segment, pieces
from vmoe.sharding import Placement
from vmoe.train.state import abstract_state

UTILISATION = 0.4
"""Share of the peak that matrix products are assumed to reach."""


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind among groups of one size, in one piece of the step."""

    piece: str
    times: int
    """How often a step has the piece."""
    kind: str
    group: int
    """Devices that take part in each."""
    count: int
    """How many there are in the piece."""
    sent: float
    """Bytes that a device sends in them, each time."""
    seconds: float
    """What they take, each time."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to lay the run over the devices."""

    mesh: str
    fsdp: bool
    memory: Memory
    compute: float = 0.0
    """Seconds of a step's matrix products; as what follows, of options that fit."""
    update: float = 0.0
    """Seconds in which state and gradients are read and written."""
    exchanges: tuple[Exchange, ...] = ()

    @property
    def sent(self) -> float:
        """Bytes that a device sends in a step."""
        return sum((exchange.sent * exchange.times for exchange in self.exchanges), 0.0)

    @property
    def exchange(self) -> float:
        """Seconds of all messages."""
        return sum((exchange.seconds * exchange.times for exchange in self.exchanges), 0.0)

    @property
    def seconds(self) -> float:
        """Of a step: one after the other."""
        return self.compute + self.update + self.exchange


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on so many devices."""

    config: TrainConfig
    devices: int
    chip: str
    device_memory: float
    """Bytes of one device."""
    parameters: int
    active_parameters: float
    """That a token meets."""
    flops: int
    """Of the matrix products of a step, on all devices together."""
    fit: tuple[Candidate, ...]
    """The options that fit into the memory, the fastest first."""
    others: tuple[Candidate, ...]
    """Those that do not, the smallest first."""


def plan(
    config: TrainConfig,
    devices: int,
    *,
    mesh: str = "",
    chip: str = "h100",
    device_memory: str = "",
) -> Plan:
    """Plans a run. Calls for a process of its own, of whose JAX it makes ``virtual_devices``.

    Args:
        mesh: "data=4,expert=8" or one of the two; all that the model and the devices allow if
            empty.
        chip: a name of ``CHIPS``.
        device_memory: "80GB" or "80GiB"; the chip's if empty.

    Raises:
        UsageError: no such chip, mesh or amount; the model or the batch do not divide.
        Failure: no mesh fits into the memory.
    """
    kind = _chip(chip, devices)
    room = _bytes(device_memory) if device_memory else kind.memory
    placements = _placements(config, virtual_devices(devices), mesh)
    placements[0].check_batch(config.batch_size)
    state = abstract_state(config)
    options = [
        Candidate(f"data={p.data},expert={p.expert}", p.fsdp, memory(config, p, state))
        for p in placements
    ]
    pairs = list(zip(options, placements, strict=True))
    fit = [(option, placement) for option, placement in pairs if option.memory.total <= room]
    if not fit:
        raise Failure(_too_large(config, options, room, devices))
    found = cost(config.model)
    flops = sum(piece.flops() * piece.times for piece in pieces(config, placements[0]))
    messages = exchanges(config, [placement for _, placement in fit], kind)
    timed = [
        _timed(option, kind, flops // devices, sent)
        for (option, _), sent in zip(fit, messages, strict=True)
    ]
    return Plan(
        config=config,
        devices=devices,
        chip=chip,
        device_memory=room,
        parameters=found.parameters,
        active_parameters=found.active_parameters,
        flops=flops,
        fit=tuple(sorted(timed, key=lambda option: option.seconds)),
        others=tuple(
            sorted(
                (option for option in options if option.memory.total > room),
                key=lambda option: option.memory.total,
            )
        ),
    )


def virtual_devices(count: int) -> Sequence[jax.Device]:
    """So many devices that are not there, for programs that are compiled and not run.

    Raises:
        UsageError: JAX has started in this process, with fewer.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # it has started, perhaps with enough
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(
            f"--devices {count}: JAX has started in this process with {len(devices)}; plan in a "
            "process of its own"
        )
    return devices[:count]


def _chip(name: str, devices: int) -> Chip:
    if name not in CHIPS:
        raise UsageError(unknown("--chip: no", name, list(CHIPS)))
    if devices < 1:
        raise UsageError(f"--devices {devices}: use at least 1")
    chip = CHIPS[name]
    if chip.network is None and devices > chip.island:
        raise UsageError(
            f"--devices {devices}: a pod of {name} has at most {chip.island}, and what joins pods "
            "is not published"
        )
    return chip


def _bytes(text: str) -> float:
    units = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20, "kB": 1e3}
    amount = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", text)
    if not amount or amount[2] not in units:
        raise UsageError(f"--device-memory {text}: a number and one of {', '.join(units)}")
    return float(amount[1]) * units[amount[2]]


def _placements(config: TrainConfig, devices: Sequence[jax.Device], mesh: str) -> list[Placement]:
    """Those to choose from: of the given mesh, or of all that divide; whole, and with fsdp."""
    experts = [config.model.moe_of(block).num_experts for block in config.model.sparse_blocks]
    sizes = range(1, min(experts, default=1) + 1)
    fitting = [n for n in sizes if all(x % n == 0 for x in (len(devices), *experts))]
    meshes = [mesh] if mesh or len(devices) == 1 else [f"expert={n}" for n in fitting]
    whole = [place(config.model, devices, mesh=one) for one in meshes]
    return whole + [dataclasses.replace(one, fsdp=True) for one in whole if one.data > 1]


def _too_large(config: TrainConfig, options: list[Candidate], room: float, devices: int) -> str:
    least = min(options, key=lambda option: option.memory.total)
    need = f"{least.memory.total / 1e9:.4g} GB a device ({least.mesh}{', fsdp' * least.fsdp})"
    spared = least.memory.kept - least.memory.kept_with_remat
    remedy = "use more devices or a smaller batch_size"
    if not config.model.remat and spared > 0:
        remedy += f"; --model.remat would spare {spared / 1e9:.4g} GB"
    return f"no mesh of {devices} devices fits into {room / 1e9:.4g} GB: at least {need}; {remedy}"


def _timed(option: Candidate, chip: Chip, flops: int, messages: list[Exchange]) -> Candidate:
    """The option with what a step takes, of so many FLOPs on each device."""
    held = option.memory.state + option.memory.gradients
    return dataclasses.replace(
        option,
        compute=flops / (chip.peak * UTILISATION),
        update=2 * held / chip.memory_bandwidth,
        exchanges=tuple(messages),
    )


def exchanges(
    config: TrainConfig, placements: Sequence[Placement], chip: Chip
) -> list[list[Exchange]]:
    """What the devices send each other in a step, by piece, in each placement."""
    steps = [pieces(config, placement) for placement in placements]
    programs = {piece.program: piece for step in steps for piece in step}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # a program is compiled on one core
        sent = dict(zip(programs, pool.map(Segment.collectives, programs.values()), strict=True))
    return [
        [exchange for piece in step for exchange in _by_kind(piece, sent[piece.program], chip)]
        for step in steps
    ]


def _by_kind(piece: Segment, sent: list[Collective], chip: Chip) -> Iterator[Exchange]:
    alike = collections.defaultdict(list)
    for collective in sent:
        alike[collective.kind, len(collective.group)].append(collective)
    for (kind, group), some in sorted(alike.items()):
        together, seconds = sum(one.sent for one in some), sum(map(chip.seconds, some))
        yield Exchange(piece.name, piece.times, kind, group, len(some), together, seconds)
