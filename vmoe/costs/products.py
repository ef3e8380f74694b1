"""The products of matrices in a compiled program: how many FLOPs, in which dtype, for which part.

TPUs compute every product as a convolution, whose windows are padded and dilated; what falls on
padding or between the elements is not counted.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from vmoe.costs.hlo import Instruction, Program, dimensions

SCOPES = (
    *("mixing", "embed", "attention", "mlp", "gate", "router", "dispatch", "experts", "combine"),
    *("moe", "pool", "head", "loss", "optimizer", "ema", "norms"),
)
"""The scopes that name the parts of a step, as ``jax.named_scope`` has them in the model."""
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([^\]}]*)')  # dot; cuBLAS
_KERNEL = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')  # of Pallas, by its own account


class Product(NamedTuple):
    """A product, a convolution, or a Pallas kernel of products.

    Attributes:
        part: of ``part_of``.
        flops: of one device in all executions; NaN in a loop of unknown length.
        float32: whether an operand is float32.
    """

    part: str
    flops: float
    float32: bool


def part_of(op_name: str) -> str:
    """The innermost scope in the name of an operation; "mlp" is also that of an expert module.

    >>> part_of("jit(step)/transpose(jvp(block1))/moe/experts/dot_general")
    'experts'
    >>> part_of("jit(step)/jvp(block0)/add")
    'block'
    """
    words = re.findall(r"\w+", op_name)
    scopes = [word for word in words if word in SCOPES]
    if scopes:
        return scopes[-1]
    return "block" if any(re.fullmatch(r"block\d+", word) for word in words) else "rest"


def products(program: Program) -> Iterator[Product]:
    """The products of a compiled program."""
    for instruction in program.instructions.values():
        flops = _flops(program, instruction)
        if flops:
            factors = instruction.operands  # of a kernel, beside numbers of rows
            if not _KERNEL.search(instruction.attributes):
                factors = factors[:2]  # what follows is a bias
            shapes = [program.instructions[name].shape for name in factors]
            yield Product(
                part_of(instruction.op_name),
                flops * program.executions(instruction.computation),
                any(shape.startswith("f32") for shape in shapes),
            )


def _flops(program: Program, instruction: Instruction) -> float:
    """FLOPs of one execution; 0 for what is no product."""
    if instruction.name == "convolution":
        left, right = (dimensions(program.instructions[x].shape) for x in instruction.operands)
        return _convolution(instruction, left, right)
    if contracted := _CONTRACTED.search(instruction.attributes):
        left = dimensions(program.instructions[instruction.operands[0]].shape)
        axes = map(int, re.findall(r"\d+", contracted[1]))
        outputs = dimensions(instruction.shape)  # of cuBLAS, without its workspace
        return 2.0 * math.prod(outputs) * math.prod(left[axis] for axis in axes)
    kernel = _KERNEL.search(instruction.attributes)
    return float(kernel[1]) if kernel else 0.0


def _convolution(instruction: Instruction, left: list[int], right: list[int]) -> float:
    """FLOPs of a convolution of arrays of these sizes."""
    out = dimensions(instruction.shape)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    assert labels is not None, "XLA labels the axes of every convolution"
    inputs, kernel, outputs = labels.groups()
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    settings = dict(x.split("=") for x in window[1].split()) if window else {}
    spatial = sorted(label for label in outputs if label.isdigit())
    valid = 1
    for number, label in enumerate(spatial):

        def setting(name: str, default: str, number: int = number) -> list[int]:
            value = settings[name].split("x")[number] if name in settings else default
            return [int(x) for x in value.split("_")]

        (stride,), (left_dilation,) = setting("stride", "1"), setting("lhs_dilate", "1")
        (right_dilation,), (low, _) = setting("rhs_dilate", "1"), setting("pad", "0_0")
        size, taps = left[inputs.index(label)], right[kernel.index(label)]
        places = np.arange(out[outputs.index(label)])[:, None] * stride
        places = places + np.arange(taps) * right_dilation - low
        inside = (places >= 0) & (places <= (size - 1) * left_dilation)
        valid *= int((inside & (places % left_dilation == 0)).sum())
    features = right[kernel.index("i")]  # of one group
    return 2.0 * valid * out[outputs.index("b")] * out[outputs.index("f")] * features
