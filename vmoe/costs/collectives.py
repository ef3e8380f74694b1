"""What devices send each other in a compiled program: its collectives, read from its text.

On a ring of n devices, of the S bytes that a device puts in, it sends

    all-to-all          S (n - 1) / n        each part but its own
    reduce-scatter      S (n - 1) / n        each part but its own, summed on the way
    all-reduce          2 S (n - 1) / n      a reduce-scatter, and an all-gather of its result
    all-gather          S (n - 1)            its own part, and what it passes on
    collective-permute  S

XLA's CPU backend widens what is bfloat16 in the program to float32, and widens it before it is
sent. Compiled with ``KEEP_APART``, the text still shows which arrays it widened, and they are
counted as what they were: as they travel on devices that have bfloat16.
"""

import math
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

KEEP_APART = {
    "xla_disable_hlo_passes": "cpu-all-reduce-combiner",  # it would join the widened with others
    "xla_allow_excess_precision": False,  # rounding and widening again are not taken for nothing
    # Nothing is run, so no time is spent on making it fast.
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    # The emitters that newer versions alone have take twice the time here.
    **({"xla_cpu_use_fusion_emitters": False} if jax.__version_info__ < (0, 11) else {}),
}
"""Compiler options under which a program has the same collectives, each array by itself."""

SENT: dict[str, Callable[[int], float]] = {  # of the bytes put in, by the size of the ring
    "all-to-all": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}


class Collective(NamedTuple):
    """One exchange between devices.

    Attributes:
        kind: "all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute".
        sent: bytes that each device sends.
        group: the devices of the first of its rings, by number; the others are alike.
    """

    kind: str
    sent: float
    group: tuple[int, ...]


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program of which all devices run the same.

    Args:
        text: ``jitted.lower(...).compile(KEEP_APART).as_text()``.

    Raises:
        ValueError: groups of devices written in a form that this reader does not know.
    """
    program = _Program(text)
    found = []
    for instruction in program.instructions.values():
        kind = instruction.name.removesuffix("-start")
        if kind not in SENT:
            continue
        group = _group(instruction.rest)
        put_in = sum(map(program.bytes, instruction.operands))
        if len(group) > 1:
            found.append(Collective(kind, put_in * SENT[kind](len(group)), group))
    return found


class _Instruction(NamedTuple):
    shape: str
    name: str
    operands: tuple[str, ...]
    rest: str


class _Program:
    """The instructions of a program by their results, and the result of each computation."""

    def __init__(self, text: str):
        self.instructions: dict[str, _Instruction] = {}
        self._roots: dict[str, str] = {}
        line = re.compile(r"\s*(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)")
        computation = ""
        for written in text.splitlines():
            if header := re.match(r"(?:ENTRY )?%(\S+) \(.*\{$", written):
                computation = header[1]
            elif match := line.match(written):
                root, result, shape, name, operands, rest = match.groups()
                names = tuple(re.findall(r"%([\w.-]+)", operands)) or (operands,)
                self.instructions[result] = _Instruction(shape, name, names, rest)
                if root:
                    self._roots[computation] = result

    def bytes(self, result: str) -> float:
        """Of an array, in the narrowest type that it had since it was computed."""
        shape = self.instructions[result].shape
        return _size(shape) * min(1.0, self._narrowest(result, ()) / _width(shape))

    def _narrowest(self, result: str, given: tuple[str, ...]) -> float:
        """Bytes of an element; in a fusion, whose parameters are what is ``given``, or outside."""
        instruction = self.instructions[result]
        here = _width(instruction.shape)
        match instruction.name:
            case "copy" | "bitcast" | "transpose" | "reshape" | "slice" | "convert":
                return min(here, self._narrowest(instruction.operands[0], given))
            case "fusion":
                root = self._roots[re.search(r"calls=%([\w.-]+)", instruction.rest)[1]]
                return min(here, self._narrowest(root, instruction.operands))
            case "parameter" if given:
                return min(here, self._narrowest(given[int(instruction.operands[0])], ()))
        return here


def _size(shape: str) -> float:
    """Bytes of an array, or of all in a tuple.

    >>> _size("(f32[2,3]{1,0}, /*index=1*/bf16[4]{0})")
    32.0
    """
    arrays = re.findall(r"\w+\[[\d,]*\]", shape)
    return sum(_width(array) * math.prod(map(int, _dims(array))) for array in arrays)


def _dims(array: str) -> list[str]:
    return re.findall(r"\d+", array.partition("[")[2])


def _width(array: str) -> float:
    """Bytes of an element: 4 of "f32[2,3]", 1 of "pred[]"."""
    bits = re.search(r"\d+", array.partition("[")[0])
    return int(bits[0]) / 8 if bits else 1.0


def _group(rest: str) -> tuple[int, ...]:
    """The first group of devices, of the forms in which XLA writes them.

    >>> _group(", replica_groups={{0,2},{1,3}}, dimensions={0}")
    (0, 2)
    >>> _group(", replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}")
    (0, 4)
    >>> _group(", replica_groups=mesh['x'=2,'y'=4] {'x'}, dimensions={0}")
    (0, 4)
    """
    if pairs := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", rest):
        return tuple(map(int, pairs[1].split(",")))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?),? ", rest + " "):
        return tuple(_iota(iota[2]).reshape(_ints(iota[1]))[0].tolist())
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
        order = _iota(mesh[2]).reshape(-1) if mesh[2] else np.arange(math.prod(sizes.values()))
        inside = [name in re.findall(r"'\w+'", mesh[3]) for name in sizes]
        where = tuple(slice(None) if within else 0 for within in inside)
        if ":" not in mesh[3]:  # a part of an axis
            return tuple(order.reshape(list(sizes.values()))[where].reshape(-1).tolist())
    raise ValueError(f"groups of devices in an unknown form: {rest[:200]}")


def _iota(text: str) -> np.ndarray:
    """Device numbers in the order of "[2,4]T(1,0)": an array of 0, 1, ... transposed."""
    shape, _, axes = text.partition("T(")
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return numbers.transpose(_ints(axes)) if axes else numbers


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
