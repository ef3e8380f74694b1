"""Memory and step time of a run on hypothetical devices, for each possible mesh.

    memory         parameters, gradients and optimizer state: exact, from shapes and shardings;
                   activations: the residuals of the program
    FLOPs          of the matmuls of a step, counted in its traced program
    communication  bytes sent in each collective, from the program compiled for the devices
    step time      an estimate from the chip's published specifications and printed assumptions

Nothing is allocated or run. Identical blocks are traced and compiled once (``segments.py``).
"""

import dataclasses
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from vmoe.config import TrainConfig, replace
from vmoe.config.train import ANY_LENGTH, LENGTHS
from vmoe.costs.chips import CHIPS, Chip
from vmoe.costs.flops import cost
from vmoe.errors import Failure, UsageError, choice, require
from vmoe.fields import at_least
from vmoe.mesh import place
from vmoe.plan.communication import Communication, communication
from vmoe.plan.memory import Memory, memory
from vmoe.plan.segments import segments
from vmoe.sharding import ONE_DEVICE, Placement
from vmoe.train.state import abstract_state

UTILIZATION = 0.4
"""Assumed fraction of the peak FLOP/s that matmuls reach."""
UNITS = {"GB": 1e9, "GiB": 2.0**30, "MB": 1e6, "MiB": 2.0**20, "kB": 1e3}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to distribute the run over the devices."""

    mesh: str
    """In the format of ``vmoe.mesh.place``."""
    fsdp: bool
    memory: Memory
    compute_seconds: float = 0.0
    """Time of a step's matmuls. This and the fields below are set only for feasible candidates."""
    update_seconds: float = 0.0
    """Time to read and write state and gradients once per step."""
    communications: tuple[Communication, ...] = ()

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device sends in a step."""
        return sum((entry.total_bytes_sent for entry in self.communications), 0.0)

    @property
    def communication_seconds(self) -> float:
        """Time of all collectives of a step."""
        return sum((entry.total_seconds for entry in self.communications), 0.0)

    @property
    def step_seconds(self) -> float:
        """Time of a step: compute, update and communication, without overlap."""
        return self.compute_seconds + self.update_seconds + self.communication_seconds


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run on a number of devices, and the ways to distribute it."""

    config: TrainConfig
    devices: int
    chip: str
    device_memory: float
    """Memory of one device, in bytes."""
    parameters: int
    active_parameters: float
    """Parameters that process one token."""
    flops: int
    """FLOPs of the matmuls of a step, summed over all devices."""
    feasible: tuple[Candidate, ...]
    """Candidates that fit into the memory, fastest first."""
    infeasible: tuple[Candidate, ...]
    """Candidates that do not fit, smallest first."""


def plan(
    config: TrainConfig,
    devices: int,
    *,
    mesh: str = "",
    chip: str = "h100",
    device_memory: str = "",
) -> Plan:
    """Plans a run. Call it before JAX is initialized in the process (``hypothetical_devices``).

    Args:
        devices: number of devices, as JAX counts them.
        mesh: "data=4,expert=8", or one of the two axes; if empty, every mesh that the model and the
            number of devices allow.
        chip: a name in ``CHIPS``.
        device_memory: memory of one device, such as "80GB" or "80GiB"; the chip's if empty.

    Raises:
        UsageError: an unknown chip, mesh or unit, or the mesh does not divide the model or batch.
        Failure: no candidate fits into the memory.
    """
    if config.steps is None:  # nothing below depends on the number of steps
        config = replace(config, **dict.fromkeys(LENGTHS) | {"steps": ANY_LENGTH})
    spec = _chip(chip, devices)
    limit = parse_bytes(device_memory) if device_memory else spec.memory
    placements = [
        dataclasses.replace(placement, stands_for=spec.platform)
        for placement in _placements(config, hypothetical_devices(devices), mesh)
    ]
    placements[0].check_batch(config.batch_size, config.accumulate)
    state = abstract_state(config)
    candidates = {  # without times
        p: Candidate(p.axes, p.fsdp, memory(config, p, state)) for p in placements
    }
    feasible = {p: c for p, c in candidates.items() if c.memory.total <= limit}
    if not feasible:
        raise _too_large(config, candidates.values(), limit, devices)
    infeasible = [c for p, c in candidates.items() if p not in feasible]
    costs = cost(config.model)
    flops = sum(each.flops() * each.times_per_step for each in segments(config, ONE_DEVICE))
    timed = _timed(config, feasible, spec, flops // devices)
    return Plan(
        config=config,
        devices=devices,
        chip=chip,
        device_memory=limit,
        parameters=costs.parameters,
        active_parameters=costs.active_parameters,
        flops=flops,
        feasible=tuple(sorted(timed, key=lambda c: c.step_seconds)),
        infeasible=tuple(sorted(infeasible, key=lambda c: c.memory.total)),
    )


def parse_bytes(device_memory: str) -> float:
    """Parses an amount of memory, such as "80GB" or "74.5 GiB", to bytes.

    >>> parse_bytes("1.5kB")
    1500.0
    """
    amount = re.fullmatch(r"(\d+(?:\.\d+)?) ?([A-Za-z]+)", device_memory)
    if not amount or amount[2] not in UNITS:
        problem = f"use a number and one of {', '.join(UNITS)}"
        raise UsageError(problem, device_memory=device_memory)
    return float(amount[1]) * UNITS[amount[2]]


def hypothetical_devices(count: int) -> Sequence[jax.Device]:
    """The given number of CPU devices, for programs that are compiled and never run.

    Raises:
        UsageError: JAX is already initialized in this process with fewer devices.
    """
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update(
            "jax_num_cpu_devices", max(count, jax.config.values["jax_num_cpu_devices"])
        )
    except RuntimeError:  # JAX is initialized already, perhaps with enough devices
        pass
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UsageError(
            f"JAX has started in this process with {len(devices)}; plan in a new process",
            devices=count,
        )
    return devices[:count]


def _chip(name: str, devices: int) -> Chip:
    require(name in CHIPS, choice(name, list(CHIPS)), chip=name)
    at_least(1).check(devices=devices)
    chip = CHIPS[name]
    if chip.network_bandwidth is None and devices > chip.domain_size:
        raise UsageError(
            f"a pod of {name} has at most {chip.domain_size}, and no bandwidth between pods is "
            "published; use fewer devices or another chip",
            devices=devices,
        )
    return chip


def _placements(config: TrainConfig, devices: Sequence[jax.Device], mesh: str) -> list[Placement]:
    """The given mesh, or every mesh that divides devices and experts; without and with fsdp."""
    experts = [moe.divisible_experts for moe in config.model.moe_blocks.values()]
    sizes = range(1, min(experts, default=1) + 1)
    fitting = [n for n in sizes if all(x % n == 0 for x in (len(devices), *experts))]
    meshes = [mesh] if mesh or len(devices) == 1 else [f"expert={n}" for n in fitting]
    replicated = [place(config.model, devices, mesh=name) for name in meshes]
    return replicated + [dataclasses.replace(p, fsdp=True) for p in replicated if p.data > 1]


def _timed(
    config: TrainConfig, candidates: dict[Placement, Candidate], chip: Chip, flops: int
) -> list[Candidate]:
    """The candidates with their step times; ``flops`` are per device."""
    sent = communication(config, list(candidates), chip)
    return [
        dataclasses.replace(
            candidate,
            compute_seconds=flops / (chip.peak_flops * UTILIZATION),
            # State is read and written once, gradients once for each part of the batch.
            update_seconds=2
            * (
                candidate.memory.state
                + (candidate.memory.gradients + candidate.memory.gradient_sum) * config.accumulate
            )
            / chip.memory_bandwidth,
            communications=communications,
        )
        for candidate, communications in zip(candidates.values(), sent, strict=True)
    ]


def _too_large(
    config: TrainConfig, candidates: Iterable[Candidate], limit: float, devices: int
) -> Failure:
    """Names the memory of the smallest candidate, and remedies."""
    smallest = min(candidates, key=lambda c: c.memory.total)
    memory = smallest.memory
    fsdp = ", fsdp" * smallest.fsdp
    need = f"{memory.total / 1e9:.4g} GB per device ({smallest.mesh}{fsdp})"
    saved = memory.temporaries_with(remat=False) - memory.temporaries_with(remat=True)
    remedy = "use more devices, a smaller batch_size or a larger accumulate"
    fields: dict[str, Any] = dict.fromkeys(("devices", "batch_size", "accumulate"))
    if not config.model.remat and saved > 0:
        remedy += f"; model.remat=True would save {saved / 1e9:.4g} GB"
        fields["model.remat"] = True
    return Failure(
        f"no mesh of {devices} devices fits into {limit / 1e9:.4g} GB: at least {need}; {remedy}"
    ).remedied_by(**fields)
