"""The sharding of every array on a mesh, as one object that is passed to all code that needs it.

    mesh       axis "data" x axis "expert"
    images     split over both axes: each device has its own images, and forms groups among them
    experts    split over "expert": e / expert of them on each device, replicated along "data"
    slots      move from the devices of their groups to the devices of their experts, and back
    dense      replicated; with fsdp one axis of each large array is split over "data"
    opt_state  as the parameters; with fsdp the experts' part is also split over "data".
               Adafactor's statistics: split over "expert" if it divides their first axis

On D devices a batch is treated as D batches, one per device: groups do not cross devices. If a
device's share is a multiple of ``images_per_group``, the groups are the same as on a single device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Shaped

from vmoe.config import Exchange, ViTConfig
from vmoe.errors import UsageError, one_of, require

Tree = TypeVar("Tree")
Function = TypeVar("Function", bound=Callable[..., Any])

DATA, EXPERT = "data", "expert"
ALL = (DATA, EXPERT)
MIN_FSDP_SIZE = 1024  # elements; splitting less saves nothing and costs a collective


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh and the shardings of arrays on it. ``Placement()`` is one device: no sharding."""

    mesh: Mesh | None = None
    """Axes "data" and "expert", as of ``jax.make_mesh``; None on one device of JAX's default
    platform."""
    fsdp: bool = False
    """Shard large dense parameters and all large optimizer state over "data"."""
    hosts: int = 1
    """Number of equal parts of "expert" with slow links between them. If more than 1, slots and
    rows are sent in two levels: inside a host, then between hosts (Tutel, arXiv 2206.03382)."""
    stands_for: str = ""
    """"cpu", "gpu" or "tpu": the platform whose implementations are chosen and costs estimated,
    where nothing is run; that of the devices if empty."""

    def __post_init__(self) -> None:
        """Raises a UsageError if the mesh has other axes, or ``hosts`` does not divide "expert"."""
        names = ALL if self.mesh is None else self.mesh.axis_names
        if names != ALL:
            raise UsageError(
                f"a mesh with the axes {names}: name them {ALL}, in this order, and give an axis "
                "that is not used the size 1",
            )
        divides = self.hosts >= 1 and self.expert % self.hosts == 0
        require(divides, f"it must divide the {self.expert} devices of expert", hosts=self.hosts)
        if self.mesh is None:
            return
        # jax.make_mesh makes Explicit axes; here XLA derives what the constraints leave open.
        auto = Mesh(self.mesh.devices, names, axis_types=(AxisType.Auto,) * len(ALL))
        object.__setattr__(self, "mesh", auto)

    @property
    def platform(self) -> str:
        """What the devices are: "cpu", "gpu" or "tpu"."""
        if self.stands_for:
            return self.stands_for
        return self.mesh.devices.flat[0].platform if self.mesh else jax.default_backend()

    @property
    def devices(self) -> int:
        """Number of devices that share a batch."""
        return 1 if self.mesh is None else self.mesh.size

    @property
    def data(self) -> int:
        """Number of replicas of the experts."""
        return 1 if self.mesh is None else self.mesh.shape[DATA]

    @property
    def expert(self) -> int:
        """Number of devices over which the experts of a layer are split."""
        return 1 if self.mesh is None else self.mesh.shape[EXPERT]

    @property
    def axes(self) -> str:
        """The sizes of the axes, in the format of ``vmoe.mesh.place``."""
        hosts = f"{self.hosts}x" if self.hosts > 1 else ""
        return f"data={self.data},expert={hosts}{self.expert // self.hosts}"

    def __str__(self) -> str:
        return self.axes + ", fsdp" * self.fsdp

    # Inside a program: sharding constraints on activations.

    def images(self, x: Array) -> Array:
        """Splits an array over all devices; its first axis is b, g, or rows of the images."""
        return self._constrained(x, PartitionSpec(ALL))

    def on_each_device(self, function: Function) -> Function:
        """A function of arrays whose first axis is g, run by each device on its own groups.

        XLA cannot partition some operations, such as top-k: it would gather every group on every
        device.
        """
        if self.mesh is None:
            return function
        return self._on_mesh(function, PartitionSpec(ALL), PartitionSpec(ALL))

    def parts(self, x: Shaped[Array, "b ..."], n: int) -> Shaped[Array, "n part ..."]:
        """Cuts each device's share of a batch into n equal parts; no image changes its device."""
        by_device = x.reshape(self.devices, n, -1, *x.shape[1:])
        parts = by_device.swapaxes(0, 1).reshape(n, -1, *x.shape[1:])
        return self._constrained(parts, PartitionSpec(None, ALL))

    def like_params(self, tree: Tree) -> Tree:
        """Splits gradients in the same way as their parameters."""
        if self.mesh is None:
            return tree
        return jax.lax.with_sharding_constraint(tree, self.params(tree))

    def to_experts(self, slots: Shaped[Array, "g e c ..."]) -> Shaped[Array, "g e c ..."]:
        """Moves slots from the devices of groups to the devices of experts, by all-to-all."""
        if self.hosts == 1:
            return self._constrained(self.images(slots), PartitionSpec(DATA, EXPERT))

        def sent(slots: Array) -> Array:
            g, e, *axes = slots.shape
            parts = slots.reshape(g, self.expert, e // self.expert, *axes).swapaxes(0, 1)
            return self.all_to_all(parts).reshape(g * self.expert, e // self.expert, *axes)

        return self._on_mesh(sent, PartitionSpec(ALL), PartitionSpec(DATA, EXPERT))(slots)

    def from_experts(self, slots: Float[Array, "g e c d"]) -> Float[Array, "g e c d"]:
        """Moves slots from the devices of experts back to the devices of groups."""
        if self.hosts == 1:
            return self.images(self._constrained(slots, PartitionSpec(DATA, EXPERT)))

        def sent(slots: Array) -> Array:
            g, e, *axes = slots.shape
            parts = self.all_to_all(slots.reshape(self.expert, g // self.expert, e, *axes))
            return parts.swapaxes(0, 1).reshape(g // self.expert, e * self.expert, *axes)

        return self._on_mesh(sent, PartitionSpec(DATA, EXPERT), PartitionSpec(ALL))(slots)

    def all_to_all(self, parts: Shaped[Array, "x ..."]) -> Shaped[Array, "x ..."]:
        """Sends each of the x devices along "expert" its part, inside a ``jax.shard_map``.

        In two levels, what the devices of a host have for one device of another host first meets in
        one device of their own, and travels from there as one message.

        Returns:
            the parts from each of the devices.
        """
        if self.hosts == 1:
            return jax.lax.all_to_all(parts, EXPERT, 0, 0)
        devices = np.arange(self.expert).reshape(self.hosts, -1)
        x = parts.reshape(*devices.shape, *parts.shape[1:])
        for axis, groups in ((1, devices), (0, devices.T)):
            x = jax.lax.all_to_all(x, EXPERT, axis, axis, axis_index_groups=groups.tolist())
        return x.reshape(parts.shape)

    def on_each_expert_device(self, function: Function) -> Function:
        """A function run by each device on its own groups and with its own experts.

        Its arguments are two trees of arrays whose first axis is g, a tree that is split over the
        experts, and one that all devices have. Its results are trees whose first axis is g.
        """
        if self.mesh is None:
            return function
        groups = PartitionSpec(ALL)
        specs = (groups, groups, PartitionSpec(EXPERT), PartitionSpec())
        return self._on_mesh(function, specs, groups)

    def replicate(self, tree: Tree) -> Tree:
        """Replicates results that every device, and so every process, needs."""
        return jax.tree.map(lambda x: self._constrained(x, PartitionSpec()), tree)

    def _on_mesh(self, function: Any, in_specs: Any, out_specs: PartitionSpec) -> Any:
        # No array of a result is replicated, and jax 0.12's check of replication fails in erfc.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def _constrained(self, x: Any, spec: PartitionSpec) -> Any:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, spec))

    # Outside: shardings of arrays between steps.

    def replicated(self) -> NamedSharding | None:
        """The sharding of an array that every device holds."""
        return self._sharding(PartitionSpec())

    def batch(self) -> NamedSharding | None:
        """The sharding of an array whose first axis is split over all devices."""
        return self._sharding(PartitionSpec(ALL))

    def params(self, tree: Tree) -> Tree:
        """The shardings of a tree of parameters, by their shapes; None on one device."""
        return self._by_leaf(tree, split_experts=False)

    def opt_state(self, tree: Tree) -> Tree:
        """The shardings of the optimizer state for a tree of parameters."""
        return self._by_leaf(tree, split_experts=True)

    def _by_leaf(self, tree: Any, *, split_experts: bool) -> Any:
        def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding | None:
            expert = any(getattr(key, "key", None) == "experts" for key in path)
            axes: list[str | None] = [None] * len(leaf.shape)
            # Adafactor also has arrays of size 1, and modules of users may have scalars.
            if expert and leaf.shape and leaf.shape[0] % self.expert == 0:
                axes[0] = EXPERT
            if self.fsdp and (split_experts or not expert) and leaf.size >= MIN_FSDP_SIZE:
                free = [
                    axis
                    for axis, size in enumerate(leaf.shape)
                    if axes[axis] is None and size % self.data == 0
                ]
                if free:
                    axes[max(free, key=lambda axis: leaf.shape[axis])] = DATA
            return self._sharding(PartitionSpec(*axes))

        return jax.tree_util.tree_map_with_path(leaf_sharding, tree)

    def _sharding(self, spec: PartitionSpec) -> NamedSharding | None:
        return None if self.mesh is None else NamedSharding(self.mesh, spec)

    # Across processes: which part of a batch this process reads.

    def process_shard(self) -> tuple[int, int]:
        """The part of every batch that this process reads: (index, number of equal parts).

        Raises:
            UsageError: the devices of a process are not contiguous in the mesh.
        """
        if self.mesh is None:
            return 0, 1
        owners = [device.process_index for device in self.mesh.devices.flat]
        order = list(dict.fromkeys(owners))
        each = len(owners) // len(order)
        if owners != [owner for owner in order for _ in range(each)]:
            raise UsageError(
                f"mesh {self}: its devices belong to the processes {owners}; every process needs "
                "the same number of devices, contiguous in the mesh"
            )
        return order.index(jax.process_index()), len(order)

    def make_global_array(self, tree: Tree) -> Tree:
        """Assembles a global batch on the devices from the parts that the processes read.

        Returns before the transfer ends.
        """
        if self.mesh is None:
            return jax.device_put(tree)
        return jax.tree.map(
            lambda part: jax.make_array_from_process_local_data(self.batch(), np.asarray(part)),
            tree,
        )

    def per_device_flag(self, flag: bool) -> Bool[Array | np.ndarray, "x"]:
        """One flag per device; all devices of a process have the flag of their process."""
        local_devices = self.devices if self.mesh is None else len(self.mesh.local_devices)
        return self.make_global_array(np.full(local_devices, flag))

    def round_up(self, batch_size: int) -> int:
        """A batch size rounded up to a multiple of the number of devices."""
        return -(-batch_size // self.devices) * self.devices

    def check_batch(self, batch_size: int, accumulate: int = 1) -> None:
        """Checks that the images of a batch can be split evenly over the devices, and into parts.

        Args:
            accumulate: number of parts into which each device cuts its images.

        Raises:
            UsageError: they cannot; the message has the nearest batch sizes, or the numbers of
                parts, that work.
        """
        if batch_size % self.devices:
            below = batch_size // self.devices * self.devices
            near = [size for size in (below, below + self.devices) if size]
            raise UsageError(
                f"each of {self.devices} devices needs the same number of images; use "
                f"{one_of(near)}, or fewer devices",
                batch_size=batch_size,
            )
        share = batch_size // self.devices
        if share % accumulate:
            raise UsageError(
                f"the {share} images of each device cannot be cut into that many equal parts; use "
                f"{one_of(divisors(share))}",
                accumulate=accumulate,
            )

    def check_axes(self, tokens: Array) -> None:
        """Checks that no array type fixes the sharding, as on a mesh with Explicit axes.

        Raises:
            UsageError: it does; the message has the remedies.
        """
        sharding = jax.typeof(tokens).sharding
        axes = sharding.mesh.explicit_axes
        if axes and (self.mesh is not None or any(sharding.spec)):
            raise UsageError(
                f"the tokens are on a mesh with Explicit axes {axes}: put them on the devices by "
                "placement.batch(), or call the layer in jax.sharding.auto_axes"
            )

    def check_levels(self, exchange: Exchange) -> None:
        """Checks that a layer can send to the experts in as many levels as the mesh has.

        Raises:
            UsageError: it cannot, since it sends rows without gaps.
        """
        if exchange.ragged and self.hosts > 1:
            raise UsageError(
                "its rows are sent to all hosts at once; leave it out, or use mesh "
                f"expert={self.expert}",
                **{"model.moe.exchange.ragged": True, "mesh": str(self)},
            )

    def check(self, model: ViTConfig) -> None:
        """Checks that a model can be split over the mesh.

        Raises:
            UsageError: the experts cannot be split, or the devices cannot send their rows.
        """
        if self.devices == 1:
            return
        for moe in model.moe_blocks.values():
            self.check_levels(moe.exchange)
            if self.expert > 1 and moe.exchange.ragged and self.platform == "cpu":
                raise UsageError(
                    "XLA has it for GPUs and TPUs only; leave it out, or use such devices",
                    **{"model.moe.exchange.ragged": True},
                )
            if self.expert > 1 and not moe.experts.alike:
                raise UsageError(
                    f"experts of different kinds cannot be split over {self.expert} devices; use "
                    "mesh expert=1",
                    **{"model.moe.experts.kind": moe.experts.kind, "mesh": str(self)},
                )
            if moe.num_experts % self.expert:
                fit = [n for n in divisors(self.devices) if moe.num_experts % n == 0]
                raise UsageError(
                    f"{self.expert} does not divide the experts; on {self.devices} devices "
                    f"expert can be {one_of(fit)}",
                    **{"model.moe.num_experts": moe.num_experts, "mesh": str(self)},
                )


ONE_DEVICE = Placement()


def divisors(n: int) -> list[int]:
    """The divisors of n, ascending."""
    return [i for i in range(1, n + 1) if n % i == 0]
