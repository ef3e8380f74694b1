"""Builds the mesh of a run from its devices."""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from vmoe.config import ViTConfig
from vmoe.errors import UsageError, one_of, require, unknown
from vmoe.sharding import ALL, DATA, EXPERT, ONE_DEVICE, Placement, divisors


def place(
    model: ViTConfig,
    devices: Sequence[jax.Device],
    *,
    mesh: str = "",
    fsdp: bool = False,
) -> Placement:
    """The placement of a model on devices.

    Args:
        mesh: "data=4,expert=8", or one of the two axes, which determines the other. If empty, the
            experts of a layer are split within one slice or host, where links are fastest.
            "expert=2x8" splits them over 2 hosts, 8 devices of each, and sends in two levels.
        fsdp: shard large dense parameters and optimizer state over "data".

    Returns:
        ``ONE_DEVICE`` for one device of JAX's default platform; a mesh, perhaps of one, for others.

    Raises:
        UsageError: the mesh does not match the number of devices, the model cannot be split over
            it, or fsdp has only one device to shard over.
    """
    sizes, hosts = _parse(mesh)
    experts = [moe.divisible_experts for moe in model.moe_blocks.values()]
    if EXPERT in sizes:
        expert = sizes[EXPERT]
    elif DATA in sizes:
        expert = max(1, len(devices) // sizes[DATA])
    else:
        expert = math.gcd(_domain_size(devices), *experts) if experts else 1
    data = sizes.get(DATA, max(1, len(devices) // expert))
    if data * expert != len(devices):
        fit = [n for n in divisors(len(devices)) if all(e % n == 0 for e in experts)]
        raise UsageError(
            f"it is {data} x {expert} = {data * expert} devices, there are "
            f"{len(devices)}; expert can be {one_of(fit)}, data is {len(devices)} / expert",
            mesh=mesh,
        )
    if fsdp and data == 1:
        raise UsageError(
            f"it splits over data, which is 1 on these {len(devices)} devices; a mesh with data=N "
            "makes it larger",
            fsdp=fsdp,
        )
    if len(devices) == 1 and devices[0].platform == jax.default_backend():
        return ONE_DEVICE
    inside, domain = expert // hosts, _domain_size(devices)
    fits = hosts == 1 or domain % inside == 0
    require(fits, f"{inside} does not divide the {domain} devices of a host or slice", mesh=mesh)
    grid = np.array(_sorted(devices)).reshape(data, expert)
    placement = Placement(Mesh(grid, ALL), fsdp, hosts)
    placement.check(model)
    return placement


def _parse(mesh: str) -> tuple[dict[str, int], int]:
    """The sizes of the named axes, and the number of hosts over which experts are split."""
    sizes, hosts = {}, 1
    for part in mesh.split(",") if mesh else ():
        name, _, size = part.partition("=")
        require(name in ALL, unknown("no axis", name, list(ALL)), mesh=mesh)
        numbers = [int(n) if n.isdecimal() else 0 for n in size.split("x")]
        valid = min(numbers) >= 1 and name not in sizes
        require(valid, "name each axis once, with a size of 1 or more", mesh=mesh)
        levels = len(numbers) == 1 or (name == EXPERT and len(numbers) == 2)
        require(levels, "give one number, or expert as hosts x devices, as expert=2x8", mesh=mesh)
        sizes[name] = math.prod(numbers)
        if name == EXPERT and len(numbers) == 2:
            hosts = numbers[0] if numbers[1] > 1 else 1
    return sizes, hosts


def _sorted(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Devices by slice, host and number, so that experts share a host or slice if possible."""
    return sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))


def _domain_size(devices: Sequence[jax.Device]) -> int:
    """The number of devices that fast links connect: the size of the smallest slice or host."""
    slices = [_slice(device) for device in devices]
    return min(slices.count(index) for index in set(slices))


def _slice(device: jax.Device) -> int:
    # A TPU in a run of one slice may lack the number of its slice.
    alone = 0 if device.platform == "tpu" else device.process_index
    return getattr(device, "slice_index", alone)
