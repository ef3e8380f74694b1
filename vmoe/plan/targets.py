"""Machines whose compilers run here: TPU slices and GPUs, for programs that are never run.

    tpu:v5e:4x8     a slice by its topology, as the compiler names it; needs the package libtpu
    gpu:h100        one GPU; needs jax-cuda12-plugin, no driver and no other part of CUDA
    gpu:h100:8      eight GPUs of one host
    gpu:h100:4x8    four hosts of eight GPUs

Both packages come with the extra ``compilers``.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
from jax.experimental import topologies

from vmoe.costs.chips import chip_of
from vmoe.errors import Failure, UsageError, choice, require

INSTALL = "install it with pip install 'vmoe[compilers]'"


class Gpu(NamedTuple):
    """What XLA's compiler asks about a GPU; the figures are those of XLA's own descriptions.

    Attributes:
        name: as JAX reports it.
        capability: CUDA compute capability.
        cores: streaming multiprocessors.
        units: floating-point units of a core.
        clock: GHz.
        memory: bytes.
        bandwidth: of the memory, bytes per second.
        cache: bytes of the second level.
        shared: bytes of shared memory of a core.
    """

    name: str
    capability: int
    cores: int
    units: int
    clock: float
    memory: int
    bandwidth: int
    cache: int
    shared: int

    def description(self) -> str:
        """As text of the message ``GpuTargetConfigProto``."""
        extension = "feature_extension: ACCELERATED_FEATURES" if self.capability >= 9 else ""
        return f"""
            gpu_device_info {{
              cuda_compute_capability {{ major: {self.capability} {extension} }}
              core_count: {self.cores}
              fpus_per_core: {self.units}
              clock_rate_ghz: {self.clock}
              device_memory_size: {self.memory}
              memory_bandwidth: {self.bandwidth}
              l2_cache_size: {self.cache}
              shared_memory_per_core: {self.shared}
              shared_memory_per_block_optin: {self.shared - 1024}
              shared_memory_per_block: 49152
              registers_per_core_limit: 65536
              registers_per_block_limit: 65536
              threads_per_block_limit: 1024
              threads_per_core_limit: 2048
              threads_per_warp: 32
              block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535
              block_dim_limit_z: 65535
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 }}
            device_description_str: "{self.name}"
        """


GPUS = {
    "a100": Gpu(
        *("NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85_100_068_864),
        *(2_039_040_000_000, 41_943_040, 167_936),
    ),
    "h100": Gpu(
        *("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84_942_979_072),
        *(3_352_320_000_000, 52_428_800, 233_472),
    ),
    "h200": Gpu(
        *("NVIDIA H200", 9, 132, 128, 1.98, 151_397_597_184),
        *(4_800_000_000_000, 52_428_800, 233_472),
    ),
    "b200": Gpu(
        *("NVIDIA B200", 10, 148, 128, 1.965, 191_514_411_008),
        *(7_672_320_000_000, 132_644_864, 233_472),
    ),
}
"""By the name in a target."""
MEGACORE = ("v4", "v5p")  # generations with two cores a chip, which JAX counts as one device


class Target(NamedTuple):
    """Devices to compile for.

    Attributes:
        name: as it was given.
        devices: what programs are compiled for; nothing can be put on them.
        memory: bytes of a device; None if they are not known.
    """

    name: str
    devices: Sequence[jax.Device]
    memory: float | None

    @property
    def refuses(self) -> bool:
        """Whether the compiler itself refuses what does not fit: that of TPUs does."""
        return self.devices[0].platform == "tpu"


def target(name: str) -> Target:
    """The devices of a target. Call it before JAX is initialized in the process.

    Args:
        name: see the module.

    Raises:
        UsageError: there is no such machine.
        Failure: its compiler is not installed.
    """
    platform, _, rest = name.partition(":")
    valid = platform in ("tpu", "gpu") and bool(rest)
    require(valid, "use a machine such as tpu:v5e:4x8, gpu:h100 or gpu:h100:8", compile=name)
    return _tpu(name, rest) if platform == "tpu" else _gpu(name, rest)


def _tpu(name: str, topology: str) -> Target:
    """The chips of a slice."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",  # asks no server which TPU this machine has
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v4-8",  # any that exists; the topology below counts
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",  # it is not used to run anything
    )
    generation, _, shape = topology.partition(":")
    options: dict[str, str | list[int]] = {}
    if generation in MEGACORE:
        options["chip_config_name"] = "megacore"
    if shape in ("1x1", "1x1x1"):
        options["chips_per_host_bounds"] = [1, 1, 1]
    devices = _devices(name, "libtpu", "tpu", topology, options)
    chip = chip_of(devices[0].device_kind)
    return Target(name, devices, chip.memory if chip else None)


def _gpu(name: str, rest: str) -> Target:
    """The GPUs of one or more hosts."""
    card, _, counts = rest.partition(":")
    require(card in GPUS, choice(card, list(GPUS)), compile=name)
    sizes = [int(count) if count.isdigit() else 0 for count in (counts or "1").split("x")]
    valid = len(sizes) <= 2 and min(sizes) > 0
    require(valid, "name the GPUs as 8, or hosts and GPUs of each as 4x8", compile=name)
    hosts, each = (1, *sizes)[-2:]
    options = {
        "target_config": GPUS[card].description(),
        "topology": f"{hosts}x1x{each}",  # each host is a domain of fast links
    }
    devices = _devices(name, "jax-cuda12-plugin", "cuda", card, options)
    return Target(name, devices, GPUS[card].memory)


def _devices(
    name: str, package: str, platform: str, topology: str, options: Mapping[str, str | list[int]]
) -> Sequence[jax.Device]:
    """The devices that a compiler has for a topology.

    Args:
        package: what has the compiler.
    """
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise Failure(f"compile={name}: the package {package} is missing; {INSTALL}")
    jax.config.update("jax_platforms", "cpu")  # what is computed, such as constants, is here
    # Programs without a device can be written to it, and not read.
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        return topologies.get_topology_desc(topology, platform, **options).devices
    except jax.errors.JaxRuntimeError as error:
        raise UsageError(str(error).splitlines()[0], compile=name) from None
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise Failure(f"compile={name}: {package} does not do it: {error}") from None
