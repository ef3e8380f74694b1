"""A run's programs, compiled for the devices of another machine and read: memory, FLOPs, messages.

Nothing is run. What is read is what the machine's own compiler made of the trainer's own training
step and of the forward pass, without a device of that kind.
"""

import collections
import dataclasses
import functools
import re
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vmoe import models
from vmoe.config import TrainConfig, replace
from vmoe.config.train import ANY_LENGTH, LENGTHS
from vmoe.costs.collectives import Collective, collectives
from vmoe.costs.flops import countable, flops_by_scope
from vmoe.costs.hlo import Program
from vmoe.costs.products import Product, part_of, products
from vmoe.data.pipeline import Batch
from vmoe.errors import Failure
from vmoe.mesh import place
from vmoe.nn.inputs import to_float
from vmoe.plan.memory import Memory, memory
from vmoe.plan.segment import with_shardings
from vmoe.plan.targets import Target
from vmoe.sharding import Placement
from vmoe.train.state import abstract_state
from vmoe.train.step import make_train_step

PROGRAMS = ("training step", "forward pass")
"""What is compiled: a step of training, and the forward pass of an evaluation."""
DTYPES = (jnp.uint8, jnp.int32, jnp.bool_)  # of a batch
OPTIONS = {
    "tpu": {},
    # Triton's products are chosen by trying them, which needs a GPU.
    "gpu": {"xla_gpu_enable_triton_gemm": False},
}
"""Of the compiler, by platform."""
REMEDY = "use more devices, a smaller batch_size, a larger accumulate, fsdp or model.remat"
"""For a program that does not fit."""
EXPANDED = 1.5
"""From how many times the FLOPs that a part needs on it is named: compilers pad small products, and
expand those of rows sorted by expert to all rows times all experts."""


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program that was compiled; sizes are bytes of one device."""

    name: str
    seconds: float
    """Of compiling."""
    arguments: int
    outputs: int
    """Without those that take the place of arguments."""
    temporaries: int
    code: int
    counted: dict[str, float]
    """By part: FLOPs of the products of the traced program, of one device."""
    products: tuple[Product, ...]
    collectives: tuple[tuple[str, float, Collective], ...]
    """Each with its part, and with how often it runs."""
    estimated_seconds: float | None
    """The compiler's own estimate of the time; None if it makes none."""

    @property
    def total(self) -> int:
        """Bytes of a device that the program needs."""
        return self.arguments + self.outputs + self.temporaries + self.code

    def by_part(self) -> Iterator["PartFlops"]:
        """FLOPs of all parts, and then of each, most first."""
        compiled = collections.defaultdict[str, float](float)
        wide = collections.defaultdict[str, float](float)
        for part, flops, float32 in self.products:
            compiled[part] += flops
            wide[part] += flops * float32
        yield PartFlops("all", *(sum(x.values()) for x in (self.counted, compiled, wide)))
        for part in sorted(compiled.keys() | self.counted, key=lambda part: -compiled[part]):
            yield PartFlops(part, self.counted.get(part, 0.0), compiled[part], wide[part])


class PartFlops(NamedTuple):
    """FLOPs of one device in a part of a program.

    Attributes:
        part: of ``part_of``.
        counted: in the traced program.
        compiled: in the compiled one.
        float32: those of products of which an operand is float32.
    """

    part: str
    counted: float
    compiled: float
    float32: float

    @property
    def expanded(self) -> bool:
        """Whether the compiler computes much more than is needed."""
        return 0 < EXPANDED * self.counted < self.compiled


@dataclasses.dataclass(frozen=True)
class Report:
    """The programs of a run for a target."""

    config: TrainConfig
    target: Target
    placement: Placement
    estimate: Memory
    """What ``vmoe plan`` estimates for the training step."""
    programs: tuple[Compiled, ...]
    """In the order of ``PROGRAMS``."""


def compile_run(
    config: TrainConfig,
    target: Target,
    *,
    mesh: str = "",
    fsdp: bool = False,
    programs: Collection[str] = PROGRAMS,
) -> Report:
    """Compiles the programs of a run. It takes minutes, on one core.

    Args:
        programs: which of ``PROGRAMS``.
        mesh: see ``place``.
        fsdp: see ``place``.

    Raises:
        UsageError: as of ``place``, or the devices cannot share a batch evenly.
        Failure: the compiler refuses a program, for instance since it does not fit.
    """
    if config.steps is None:  # no program depends on the number of steps
        config = replace(config, **dict.fromkeys(LENGTHS) | {"steps": ANY_LENGTH})
    placement = place(config.model, target.devices, mesh=mesh, fsdp=fsdp)
    placement.check_batch(config.batch_size, config.accumulate)
    estimate = memory(config, placement, abstract_state(config))
    compiled = tuple(
        _compiled(name, program, arguments, config, placement)
        for name, program, arguments in _programs(config, placement)
        if name in programs
    )
    return Report(config, target, placement, estimate, compiled)


def _programs(
    config: TrainConfig, placement: Placement
) -> Iterator[tuple[str, Callable[[TrainConfig], Any], tuple[Any, ...]]]:
    """The name of each program, the program of a config, jitted, and its arguments' shapes."""
    state = abstract_state(config, placement)
    b, side = config.batch_size, config.model.image_size
    sizes = (b, side, side, 3), (b, 1), (b,)
    batch = with_shardings(list(map(jax.ShapeDtypeStruct, sizes, DTYPES)), placement.batch())
    step, forward_pass = PROGRAMS
    yield (
        step,
        functools.partial(make_train_step, placement=placement),
        (state, Batch(*batch)),
    )

    def of(config: TrainConfig) -> jax.stages.Wrapped:
        def forward(params: Any, images: jax.Array) -> jax.Array:
            model = models.with_params(config.model, params, placement=placement)
            return model(to_float(images))

        return jax.jit(forward)

    yield forward_pass, of, (state.params, batch[0])


def _compiled(
    name: str,
    of: Callable[[TrainConfig], Any],
    arguments: tuple[Any, ...],
    config: TrainConfig,
    placement: Placement,
) -> Compiled:
    """Compiles a program and reads it."""
    start = time.perf_counter()
    try:
        compiled = of(config).lower(*arguments).compile(OPTIONS[placement.platform])
    except jax.errors.JaxRuntimeError as error:
        raise Failure(f"{name}: {_reason(str(error))}") from None
    seconds = time.perf_counter() - start
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert text is not None, "compilers give the text of a program"
    program = Program(text)
    costs = compiled.cost_analysis() or {}
    optimal = costs.get("optimal_seconds", 0.0)
    traced = of(replace(config, model=countable(config.model))).trace(*arguments).jaxpr
    counted = collections.defaultdict[str, float](float)
    for scope, flops in flops_by_scope(traced.jaxpr).items():
        counted[part_of(scope)] += flops / placement.devices
    return Compiled(
        name=name,
        seconds=seconds,
        arguments=analysis.argument_size_in_bytes,
        outputs=analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        temporaries=analysis.temp_size_in_bytes,
        code=analysis.generated_code_size_in_bytes,
        counted=counted,
        products=tuple(products(program)),
        collectives=tuple(
            (part_of(each.op_name), program.executions(each.computation), collective)
            for each, collective in collectives(program)
        ),
        estimated_seconds=optimal if optimal > 0 else None,
    )


def _reason(message: str) -> str:
    """What a compiler's refusal says, in a line."""
    # libtpu 0.0.41: "Used 26.5G of 15.75G hbm"; 0.0.50: "(26.51G) exceeds available HBM (15.75G)".
    needs = r"(?:Used |\()([\d.]+\w)\)? (?:of|exceeds available HBM) \(?([\d.]+\w)"
    if used := re.search(needs, message):
        return f"it needs {used[1]} of a device's {used[2]} (the compiler's units): {REMEDY}"
    return message.splitlines()[0]
