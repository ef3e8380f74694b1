"""The collectives of a compiled program and the bytes that each device sends in them.

On a ring of n devices, with S bytes of input per device, a device sends

    all-to-all          S (n - 1) / n        every part but its own
    reduce-scatter      S (n - 1) / n        every part but its own, summed on the way
    all-reduce          2 S (n - 1) / n      a reduce-scatter, then an all-gather of its result
    all-gather          S (n - 1)            its own part, and those it forwards
    collective-permute  S

XLA's CPU backend computes in float32 where the program says bfloat16, and converts before it sends.
In the text of a program compiled with ``COMPILER_OPTIONS`` those conversions are still visible, and
such an array is counted in bfloat16: as it travels between devices that support bfloat16.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vmoe.costs.hlo import Program, replica_group

COMPILER_OPTIONS: dict[str, Any] = {
    # The combiner would join converted arrays with others.
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner",
    # Otherwise XLA removes a rounding to bfloat16 that is followed by a conversion to float32.
    "xla_allow_excess_precision": False,
    # The program is read and never run: no time is spent on optimising it.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # These emitters take twice the time to compile here; newer versions of jax have no others.
    **({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}),
}
"""For ``Lowered.compile``: the same collectives, each array by itself, compiled quickly."""

_SENT: dict[str, Callable[[int], float]] = {  # bytes sent per byte of input, by ring size
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


class Collective(NamedTuple):
    """One collective operation.

    Attributes:
        kind: "all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute".
        bytes_sent: by each device.
        replica_group: device numbers of the first group; the other groups are like it.
    """

    kind: str
    bytes_sent: float
    replica_group: tuple[int, ...]


def parse_collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program that all devices run.

    Args:
        text: ``jitted.lower(...).compile(COMPILER_OPTIONS).as_text()``.

    Raises:
        ValueError: the replica groups are written in an unknown form.
    """
    program = Program(text)
    found = []
    for instruction in program.instructions.values():
        kind = instruction.name.removesuffix("-start")
        if kind not in _SENT:
            continue
        group = replica_group(instruction.attributes)
        inputs = sum(map(program.narrowest_bytes, instruction.operands))
        if len(group) > 1:
            found.append(Collective(kind, inputs * _SENT[kind](len(group)), group))
    return found
