"""Where every array lies: one object that knows the mesh, passed to whoever places something.

    mesh     axis "data" x axis "expert"; a device is one place of it
    images   over both axes: each device has its own, and groups are formed among those
    experts  over "expert": e / expert of them on each device, the same along "data"
    slots    from the devices of their groups to those of their experts, and back
    dense    on every device; with fsdp one axis of each large array is split over "data"
    moments  as their parameters; with fsdp those of the experts are split over "data" as well

On D devices a batch is treated as D batches, one a device: groups do not cross devices. Where
``images_per_group`` divides a device's share these are the groups of one device.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float

from vmoe.config import ViTConfig
from vmoe.errors import UsageError, unknown

Tree = TypeVar("Tree")
Function = TypeVar("Function", bound=Callable[..., Any])

DATA, EXPERT = "data", "expert"
ALL = (DATA, EXPERT)
SMALL = 1024  # elements; splitting less saves nothing and costs a message


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and where arrays lie on it. ``Placement()`` is one device, and changes nothing."""

    mesh: Mesh | None = None
    """Axes "data" and "expert"; None on one device."""
    fsdp: bool = False
    """Split large dense parameters and all large optimiser state over "data"."""

    @property
    def devices(self) -> int:
        """How many devices share a batch."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def data(self) -> int:
        """How often the experts are repeated."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def expert(self) -> int:
        """Over how many devices the experts of a layer are spread."""
        return 1 if self.mesh is None else self.mesh.shape[EXPERT]

    def __str__(self) -> str:
        split = ", fsdp" if self.fsdp else ""
        return f"data={self.data},expert={self.expert}{split}"

    # Inside a program: constraints on activations.

    def images(self, x: Array) -> Array:
        """An array whose first axis is b or g, or counts rows of images: over all devices."""
        return self._constrained(x, PartitionSpec(ALL))

    def on_each_device(self, function: Function) -> Function:
        """A function of arrays whose first axis is g, run by each device on its own groups.

        What XLA cannot spread by itself, as top-k, would gather every group on every device.
        """
        if self.mesh is None:
            return function
        spec = PartitionSpec(ALL)
        # Nothing in it is the same on two devices, and jax 0.12's check of that trips over erfc.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False
        )

    def to_experts(self, slots: Float[Array, "g e c d"]) -> Float[Array, "g e c d"]:
        """Slots from the devices of their groups to those of their experts: one all-to-all."""
        return self._constrained(self.images(slots), PartitionSpec(DATA, EXPERT))

    def from_experts(self, slots: Float[Array, "g e c d"]) -> Float[Array, "g e c d"]:
        """And back."""
        return self.images(self._constrained(slots, PartitionSpec(DATA, EXPERT)))

    def _constrained(self, x: Array, spec: PartitionSpec) -> Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    def everywhere(self, tree: Tree) -> Tree:
        """Results that every device, and so every process, is to have."""
        return jax.tree.map(lambda x: self._constrained(x, PartitionSpec()), tree)

    # Outside: where arrays lie between steps.

    def replicated(self) -> NamedSharding | None:
        """On every device."""
        return self._sharding(PartitionSpec())

    def batch(self) -> NamedSharding | None:
        """The first axis over all devices."""
        return self._sharding(PartitionSpec(ALL))

    def params(self, tree: Tree) -> Tree:
        """The shardings of a tree of parameters, by their shapes; None on one device."""
        return self._by_leaf(tree, experts_at_rest=False)

    def moments(self, tree: Tree) -> Tree:
        """The shardings of what an optimiser keeps for such a tree."""
        return self._by_leaf(tree, experts_at_rest=True)

    def _by_leaf(self, tree: Any, *, experts_at_rest: bool) -> Any:
        def of(path: tuple[Any, ...], leaf: Any) -> NamedSharding | None:
            split = any(getattr(key, "key", None) == "experts" for key in path)
            axes: list[str | None] = [None] * len(leaf.shape)
            if split:
                axes[0] = EXPERT
            if self.fsdp and (experts_at_rest or not split) and leaf.size >= SMALL:
                free = [
                    axis
                    for axis, size in enumerate(leaf.shape)
                    if axes[axis] is None and size % self.data == 0
                ]
                if free:
                    axes[max(free, key=lambda axis: leaf.shape[axis])] = DATA
            return self._sharding(PartitionSpec(*axes))

        return jax.tree_util.tree_map_with_path(of, tree)

    def _sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    # Across processes: which part of a batch is read here.

    def share(self) -> tuple[int, int]:
        """Which of how many equal parts of every batch this process reads.

        Raises:
            UsageError: the devices of a process are not neighbours in the mesh.
        """
        if self.mesh is None:
            return 0, 1
        owners = [device.process_index for device in self.mesh.devices.flat]
        order = list(dict.fromkeys(owners))
        each = len(owners) // len(order)
        if owners != [owner for owner in order for _ in range(each)]:
            raise UsageError(
                f"--mesh {self}: its devices belong to the processes {owners}; each process has to "
                "have as many, and neighbours"
            )
        return order.index(jax.process_index()), len(order)

    def put(self, tree: Tree) -> Tree:
        """The whole of a batch out of the parts that the processes read."""
        if self.mesh is None:
            return tree
        return jax.tree.map(
            lambda part: jax.make_array_from_process_local_data(self.batch(), np.asarray(part)),
            tree,
        )

    def everyone(self, flag: bool) -> Bool[Array | np.ndarray, "x"]:
        """A flag of each process, once for each of its devices."""
        own = self.devices if self.mesh is None else len(self.mesh.local_devices)
        return self.put(np.full(own, flag))

    def rounded(self, batch_size: int) -> int:
        """A batch size rounded up to a multiple of the devices."""
        return -(-batch_size // self.devices) * self.devices

    def check_batch(self, batch_size: int) -> None:
        """Refuses a batch whose images cannot be spread evenly.

        Raises:
            UsageError: names the nearest sizes that can.
        """
        if batch_size % self.devices:
            below = batch_size // self.devices * self.devices
            near = [size for size in (below, below + self.devices) if size]
            raise UsageError(
                f"a batch of {batch_size} on {self.devices} devices: each needs as many images; "
                f"use {_or(near)}, or let it see fewer devices"
            )

    def check(self, model: ViTConfig) -> None:
        """Refuses a model that cannot be spread so.

        Raises:
            UsageError: the experts do not divide, or an expert computation that needs all rows.
        """
        if self.mesh is None:
            return
        for moe in map(model.moe_of, model.sparse_blocks):
            if moe.experts % self.expert:
                fit = [n for n in _divisors(self.devices) if moe.experts % n == 0]
                raise UsageError(
                    f"--mesh {self}: model.moe.experts={moe.experts} do not divide over "
                    f"expert={self.expert}; on {self.devices} devices expert may be {_or(fit)}"
                )
            if moe.dropless:
                raise UsageError(
                    f"moe.dropless on {self.devices} devices: without capacity one expert may get "
                    "every row; give a moe.capacity_factor, or use one device"
                )
            if moe.computation in ("blocks", "ragged"):
                raise UsageError(
                    f"moe.computation={moe.computation} on {self.devices} devices: rows are sorted "
                    "over all groups there; use batched, or auto, or one device"
                )


ONE_DEVICE = Placement()


def place(
    model: ViTConfig,
    devices: Sequence[jax.Device],
    *,
    mesh: str = "",
    fsdp: bool = False,
) -> Placement:
    """The placement of a model on devices.

    Args:
        mesh: "data=4,expert=8", or one of the two, the other follows; if empty, experts are
            spread as far as they divide within one slice or host, whose links are the fastest.

    Raises:
        UsageError: no such mesh of so many devices, the model does not divide so, or fsdp has
            nothing to split over.
    """
    given = _parsed(mesh)
    experts = [model.moe_of(block).experts for block in model.sparse_blocks]
    if EXPERT in given:
        expert = given[EXPERT]
    elif DATA in given:
        expert = max(1, len(devices) // given[DATA])
    else:
        expert = math.gcd(_island(devices), *experts) if experts else 1
    data = given.get(DATA, max(1, len(devices) // expert))
    if data * expert != len(devices):
        fit = [n for n in _divisors(len(devices)) if all(e % n == 0 for e in experts)]
        raise UsageError(
            f"--mesh {mesh}: data={data} x expert={expert} are {data * expert} devices, there are "
            f"{len(devices)}; expert may be {_or(fit)}, data is {len(devices)} / expert"
        )
    if fsdp and data == 1:
        raise UsageError(
            f"--fsdp splits over data, which is 1 of {len(devices)} devices here; --mesh data=N "
            "makes it larger"
        )
    if len(devices) == 1:
        return ONE_DEVICE
    placement = Placement(Mesh(np.array(_in_order(devices)).reshape(data, expert), ALL), fsdp)
    placement.check(model)
    return placement


def _parsed(mesh: str) -> dict[str, int]:
    given = {}
    for part in mesh.split(",") if mesh else ():
        name, _, size = part.partition("=")
        if name not in ALL:
            raise UsageError(unknown(f"--mesh {mesh}: no axis", name, list(ALL)))
        if not size.isdigit() or int(size) < 1 or name in given:
            raise UsageError(f"--mesh {mesh}: each axis once, with a size of 1 or more")
        given[name] = int(size)
    return given


def _in_order(devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Neighbours stay neighbours, so that experts share a host or slice as far as they fit."""
    return sorted(devices, key=lambda device: (_slice(device), device.process_index, device.id))


def _island(devices: Sequence[jax.Device]) -> int:
    """Devices of the smallest slice; of the smallest host where there are no slices."""
    slices = [_slice(device) for device in devices]
    return min(slices.count(one) for one in set(slices))


def _slice(device: jax.Device) -> int:
    found = getattr(device, "slice_index", None)
    return device.process_index if found is None else found


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def _or(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if numbers[1:] else "") + str(numbers[-1])
