"""Parses the text of a compiled XLA program (HLO): instructions, loops, sizes, replica groups."""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

_LINE = re.compile(r"\s*(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\(([^)]*)\)(.*)")
_HEADER = re.compile(r"(?:ENTRY )?%(\S+) \(.*\{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|called_computations|branch_computations"
    r"|true_computation|false_computation)=(?:\{([^}]*)\}|(%[\w.-]+))"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_LOOP = re.compile(r"condition=%([\w.-]+), body=%([\w.-]+)")


class Instruction(NamedTuple):
    """One line of a program.

    Attributes:
        shape: shape of the result, such as "f32[2,3]{1,0}"; tuples of shapes are in parentheses.
        name: the operation, such as "all-reduce".
        operands: names of the results it reads; for a parameter, its number.
        attributes: the rest of the line.
        computation: the one that it is in.
    """

    shape: str
    name: str
    operands: tuple[str, ...]
    attributes: str
    computation: str

    @property
    def op_name(self) -> str:
        """Where it comes from: the scopes of the traced program, and its operation there."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""


class Program:
    """The instructions of a program, by name of the result."""

    def __init__(self, text: str):
        """``text``: from ``Compiled.as_text()``."""
        self.instructions: dict[str, Instruction] = {}
        self._roots: dict[str, str] = {}  # the result of each computation
        self._callers: dict[str, list[Instruction]] = collections.defaultdict(list)
        self._executions: dict[str, float] = {}
        computation = ""
        for line in text.splitlines():
            if header := _HEADER.match(line):
                computation = header[1]
            elif match := _LINE.match(line):
                root, result, shape, name, operands, attributes = match.groups()
                names = tuple(re.findall(r"%([\w.-]+)", operands)) or (operands,)
                instruction = Instruction(shape, name, names, attributes, computation)
                self.instructions[result] = instruction
                for several, one in _CALLED.findall(attributes):
                    for called in re.findall(r"%([\w.-]+)", several or one):
                        self._callers[called].append(instruction)
                if root:
                    self._roots[computation] = result

    def executions(self, computation: str) -> float:
        """How often a computation runs; NaN in a loop whose length is not known.

        Every branch of a conditional counts.
        """
        if computation not in self._executions:
            callers = self._callers[computation]
            runs = [self.executions(each.computation) * self._trips(each) for each in callers]
            self._executions[computation] = sum(runs) if runs else 1.0
        return self._executions[computation]

    def _trips(self, caller: Instruction) -> float:
        """How often an instruction runs what it calls; NaN if the text does not say."""
        if caller.name != "while":
            return 1.0
        if known := _TRIPS.search(caller.attributes):
            return float(known[1])
        # XLA writes no count for the loops of products whose operands or results travel between
        # the devices: these add a constant to a counter while it is below another.
        loop = _LOOP.search(caller.attributes)
        assert loop is not None, "XLA names both computations of every loop"
        test = self.instructions[self._roots[loop[1]]]
        index = self._element(test.operands[0])
        # The states before the loop and after its body.
        states = [self.instructions[x] for x in (caller.operands[0], self._roots[loop[2]])]
        tuples = all(state.name == "tuple" for state in states)
        if index is None or not tuples or "direction=LT" not in test.attributes:
            return math.nan
        first, after = (state.operands[index] for state in states)
        add = self.instructions[after]
        if add.name != "add" or self._element(add.operands[0]) != index:
            return math.nan
        limit, start, step = map(self._constant, (test.operands[1], first, add.operands[1]))
        return -((start - limit) // step)

    def _element(self, result: str) -> int | None:
        """Which element of its computation's parameter a result is; None for any other result."""
        instruction = self.instructions.get(result)  # none for the value of a constant
        index = re.match(r", index=(\d+)", instruction.attributes) if instruction else None
        if instruction is None or index is None:
            return None
        whole = self.instructions[instruction.operands[0]]
        return int(index[1]) if whole.name == "parameter" else None

    def _constant(self, result: str) -> float:
        """The value of a scalar; NaN if it is computed."""
        instruction = self.instructions[result]
        if instruction.name == "copy":
            return self._constant(instruction.operands[0])
        return float(instruction.operands[0]) if instruction.name == "constant" else math.nan

    def narrowest_bytes(self, result: str) -> float:
        """Bytes of an array in the narrowest dtype that it had since it was computed."""
        shape = self.instructions[result].shape
        return size(shape) * min(1.0, self._narrowest(result, ()) / _itemsize(shape))

    def _narrowest(self, result: str, arguments: tuple[str, ...]) -> float:
        """Bytes per element; ``arguments``: operands of the enclosing fusion, () outside of one."""
        instruction = self.instructions[result]
        own = _itemsize(instruction.shape)
        match instruction.name:
            case "copy" | "bitcast" | "transpose" | "reshape" | "slice" | "convert":
                return min(own, self._narrowest(instruction.operands[0], arguments))
            case "fusion":
                root = self._roots[re.findall(r"calls=%([\w.-]+)", instruction.attributes)[0]]
                return min(own, self._narrowest(root, instruction.operands))
            case "parameter" if arguments:
                return min(own, self._narrowest(arguments[int(instruction.operands[0])], ()))
        return own


def dimensions(shape: str) -> list[int]:
    """The sizes of an array's axes.

    >>> dimensions("bf16[128,17]{1,0:T(8,128)}")
    [128, 17]
    """
    return _ints(shape.partition("[")[2].partition("]")[0])


def size(shape: str) -> float:
    """Bytes of an array, or of all arrays in a tuple.

    >>> size("(f32[2,3]{1,0}, /*index=1*/bf16[4]{0})")
    32.0
    """
    arrays = re.findall(r"\w+\[[\d,]*\]", shape)
    return sum(_itemsize(array) * math.prod(_ints(array.partition("[")[2])) for array in arrays)


def replica_group(attributes: str) -> tuple[int, ...]:
    """The device numbers of a collective's first group, from any of XLA's notations.

    >>> replica_group(", replica_groups={{0,2},{1,3}}, dimensions={0}")
    (0, 2)
    >>> replica_group(", replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}")
    (0, 4)
    >>> replica_group(", replica_groups=mesh['x'=2,'y'=4] {'x'}, dimensions={0}")
    (0, 4)
    >>> replica_group(", replica_groups=mesh['x'=2,'y'=2], device_ids=(0,2,1,3) {'y'}, a=1")
    (0, 2)
    """
    if pairs := re.search(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, pairs[1].split(",")))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\S+?),? ", attributes + " "):
        return tuple(_iota(iota[2]).reshape(_ints(iota[1]))[0].tolist())
    if mesh := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", attributes
    ):
        axes, order, used = mesh.groups()
        if ":" not in used:  # ":" names a part of an axis
            return _mesh_group(axes, order, used)
    raise ValueError(f"replica groups in an unknown form: {attributes[:200]}")


def _mesh_group(axes: str, order: str | None, used: str) -> tuple[int, ...]:
    """The first group over the ``used`` axes of a mesh whose devices are in the given order."""
    sizes = {name: int(size) for name, size in re.findall(r"('\w+')=(\d+)", axes)}
    devices = _iota(order).reshape(-1) if order else np.arange(math.prod(sizes.values()))
    names = re.findall(r"'\w+'", used)
    first = tuple(slice(None) if name in names else 0 for name in sizes)
    return tuple(devices.reshape(list(sizes.values()))[first].reshape(-1).tolist())


def _iota(text: str) -> np.ndarray:
    """Device numbers from a list, or from "[2,4]T(1,0)", a reshaped and transposed range."""
    if not text.startswith("["):
        return np.array(_ints(text))
    shape, _, axes = text.partition("T(")
    numbers = np.arange(math.prod(_ints(shape))).reshape(_ints(shape))
    return numbers.transpose(_ints(axes)) if axes else numbers


def _itemsize(array: str) -> float:
    """Bytes per element: 4 for "f32[2,3]", 1 for "pred[]"."""
    bits = re.search(r"\d+", array.partition("[")[0])
    return int(bits[0]) / 8 if bits else 1.0


def _ints(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
