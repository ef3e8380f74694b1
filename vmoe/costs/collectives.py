"""The collectives of a compiled program and the bytes that each device sends in them.

On a ring of n devices, with S bytes of input per device, a device sends

    all-to-all          S (n - 1) / n        every part but its own
    reduce-scatter      S (n - 1) / n        every part but its own, summed along the ring
    all-reduce          2 S (n - 1) / n      a reduce-scatter, then an all-gather of its result
    all-gather          S (n - 1)            its own part, and the parts that it forwards
    collective-permute  S
    ragged-all-to-all   S (n - 1) / n        where S is the smaller of the arrays that are sent and
                                             received: the rows of an even load, as all of the
                                             choices of a device travel, or come back

XLA's CPU backend converts bfloat16 arrays to float32 before it sends them. In the text of a program
compiled with ``COMPILER_OPTIONS`` those conversions are visible, and such arrays are counted as
bfloat16, as devices that support bfloat16 send them.
"""

import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from vmoe.costs.hlo import Instruction, Program, replica_group

COMPILER_OPTIONS: dict[str, Any] = {
    # The combiner would merge converted arrays with others.
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner",
    # Otherwise XLA removes a rounding to bfloat16 that is followed by a conversion to float32.
    "xla_allow_excess_precision": False,
    # The program is never run, so optimizing it would waste time.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # These emitters compile half as fast here; newer versions of jax have no others.
    **({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}),
}
"""For ``Lowered.compile``: quick to compile, with a separate collective for each array."""

_SENT: dict[str, Callable[[int], float]] = {  # bytes sent per byte of input, by ring size
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "ragged-all-to-all": lambda n: (n - 1) / n,
}


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
        kind: "all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute",
            "ragged-all-to-all".
        bytes_sent: bytes that each device sends.
        replica_group: device numbers of the first group; other groups have the same layout.
        asynchronous: whether other operations can run between its start and its end.
    """

    kind: str
    bytes_sent: float
    replica_group: tuple[int, ...]
    asynchronous: bool = False


def parse_collectives(text: str) -> list[Collective]:
    """The collectives in the text of a program that all devices run; one in a loop counts once.

    Args:
        text: ``jitted.lower(...).compile(COMPILER_OPTIONS).as_text()``.
    """
    program = Program(text)
    return [collective for _, collective in collectives(program)]


def collectives(program: Program) -> Iterator[tuple[Instruction, Collective]]:
    """The collectives in the text of a program, each with its instruction.

    The compiler of TPUs splits a collective into steps beside products, also in loops: each is a
    fusion with the whole collective in it. Only the one that starts it is counted.
    """
    started = {
        operand: _channel(program.instructions[operand])
        for instruction in program.instructions.values()
        if 'custom_call_target="AsyncCollectiveStart"' in instruction.attributes
        for operand in instruction.operands
    }
    channels = set(started.values()) - {None}
    for result, instruction in program.instructions.items():
        kind = instruction.name.removesuffix("-start")
        if kind not in _SENT or (_channel(instruction) in channels and result not in started):
            continue
        group = replica_group(instruction.attributes)
        sizes = list(map(program.narrowest_bytes, instruction.operands))
        inputs = min(sizes[:2]) if kind == "ragged-all-to-all" else sum(sizes)
        if len(group) > 1:
            # GPUs have pairs of start and end also where nothing runs between them.
            paired = kind != instruction.name and '"is_sync":true' not in instruction.attributes
            asynchronous = paired or result in started
            sent = inputs * _SENT[kind](len(group))
            yield instruction, Collective(kind, sent, group, asynchronous)


def _channel(instruction: Instruction) -> str | None:
    """What the parts of one collective have in common."""
    found = re.search(r"channel_id=(\d+)", instruction.attributes)
    return found[1] if found else None
