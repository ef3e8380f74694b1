"""Bytes and time of communication in a training step, by segment and collective."""

import collections
import dataclasses
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from vmoe.config import TrainConfig
from vmoe.costs.chips import Chip
from vmoe.costs.collectives import Collective
from vmoe.plan.segment import Segment
from vmoe.plan.segments import segments
from vmoe.sharding import Placement


@dataclasses.dataclass(frozen=True)
class Communication:
    """All collectives of one kind over groups of one size, in one segment of the step."""

    segment: str
    times: int
    """Number of executions of the segment in a step."""
    kind: str
    """Kind of the collectives, as in ``Collective``."""
    group_size: int
    """Devices in each collective."""
    count: int
    """Number of collectives in one execution of the segment."""
    bytes_sent: float
    """Bytes that each device sends in one execution of the segment."""
    seconds: float
    """Time of one execution of the segment."""

    @property
    def total_bytes_sent(self) -> float:
        """Bytes that each device sends in a step."""
        return self.bytes_sent * self.times

    @property
    def total_seconds(self) -> float:
        """Time per step."""
        return self.seconds * self.times


def communication(
    config: TrainConfig, placements: Sequence[Placement], chip: Chip
) -> list[tuple[Communication, ...]]:
    """The communication of a step in each placement.

    Each distinct program is compiled once, several in parallel.

    Args:
        placements: meshes of the same number of devices.
    """
    steps = [segments(config, placement) for placement in placements]
    programs = {segment.program_key: segment for step in steps for segment in step}
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # XLA compiles a program on one core
        collectives = dict(
            zip(programs, pool.map(Segment.collectives, programs.values()), strict=True)
        )
    return [
        tuple(
            entry
            for segment in step
            for entry in _by_kind(segment, collectives[segment.program_key], chip)
        )
        for step in steps
    ]


def _by_kind(
    segment: Segment, collectives: list[Collective], chip: Chip
) -> Iterator[Communication]:
    by_kind = collections.defaultdict(list)
    for collective in collectives:
        by_kind[collective.kind, len(collective.replica_group)].append(collective)
    for (kind, group_size), members in sorted(by_kind.items()):
        yield Communication(
            segment=segment.name,
            times=segment.times_per_step,
            kind=kind,
            group_size=group_size,
            count=len(members),
            bytes_sent=sum(collective.bytes_sent for collective in members),
            seconds=sum(map(chip.collective_seconds, members)),
        )
