"""Published specifications of accelerators, per device as JAX counts devices.

    TPU v3    https://cloud.google.com/tpu/docs/v3; links: Jouppi et al., "A Domain Specific
              Supercomputer for Training Deep Neural Networks", CACM 2020: 4 of 656 Gbit/s. JAX
              counts the two cores of a chip as devices; each is given half of the chip.
    TPU v4    https://cloud.google.com/tpu/docs/v4; links: Jouppi et al., "TPU v4", ISCA 2023,
              table 4: 6 of 50 GB/s.
    TPU v5e   https://cloud.google.com/tpu/docs/v5e: links of 400 GB/s in both directions, network
              of 6.4 Tbit/s for a pod of 256
    TPU v5p   https://cloud.google.com/tpu/docs/v5p: links of 1,200 GB/s in both directions, network
              of 50 Gbit/s per chip
    A100      NVIDIA A100 80GB SXM and DGX A100 datasheets: NVLink of 600 GB/s in both directions,
              8 x 200 Gbit/s between hosts
    H100      NVIDIA H100 SXM and DGX H100 datasheets: NVLink of 900 GB/s in both directions,
              8 x 400 Gbit/s between hosts; peak without sparsity
    H200      NVIDIA H200 SXM and DGX H200 datasheets: as the H100, with other memory

All bandwidths below are for one direction. A *domain* is the largest set of devices that the fast
links connect: the GPUs of a host (NVLink), the chips of a TPU pod (ICI).
"""

import dataclasses

from vmoe.costs.collectives import Collective

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device and its links; bandwidths are bytes per second that one device can send."""

    peak_flops: float
    """Peak of bfloat16 matmuls, FLOP/s."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    """Bytes per second, reading or writing."""
    domain_size: int
    """Devices in one NVLink/ICI domain."""
    link_bandwidth: float
    """Bandwidth within a domain."""
    network_bandwidth: float | None
    """Bandwidth between domains; None if none is published."""
    platform: str
    """"gpu" or "tpu"."""

    def collective_seconds(self, collective: Collective) -> float:
        """Seconds that a collective takes at the published bandwidths, with nothing else running.

        Devices are numbered domain by domain. A ring over several domains leaves a domain through
        the networks of all its devices there, in parallel. In an all-to-all, each device sends data
        for other domains through its own network.
        """
        devices = collective.replica_group
        domain = devices[0] // self.domain_size
        inside = sum(device // self.domain_size == domain for device in devices)
        if inside == len(devices):
            return collective.bytes_sent / self.link_bandwidth
        network = self.network_bandwidth or 0.0
        if collective.kind == "all-to-all":
            outside = collective.bytes_sent * (len(devices) - inside) / (len(devices) - 1)
            within = collective.bytes_sent - outside
            return max(outside / network, within / self.link_bandwidth)
        return collective.bytes_sent / min(self.link_bandwidth, inside * network)


CHIPS = {
    "tpu_v3": Chip(61.5e12, 16 * 2.0**30, 450 * GB, 2048, 164 * GB, None, "tpu"),
    "tpu_v4": Chip(275e12, 32 * 2.0**30, 1200 * GB, 4096, 300 * GB, None, "tpu"),
    "tpu_v5e": Chip(197e12, 16 * GB, 819 * GB, 256, 200 * GB, 3.125 * GB, "tpu"),
    "tpu_v5p": Chip(459e12, 95 * GB, 2765 * GB, 8960, 600 * GB, 6.25 * GB, "tpu"),
    "a100": Chip(312e12, 80 * GB, 2039 * GB, 8, 300 * GB, 25 * GB, "gpu"),
    "h100": Chip(989e12, 80 * GB, 3350 * GB, 8, 450 * GB, 50 * GB, "gpu"),
    "h200": Chip(989e12, 141 * GB, 4800 * GB, 8, 450 * GB, 50 * GB, "gpu"),
}
"""Chips by name, as ``vmoe.plan.candidates.plan`` takes them."""

DEVICE_KINDS = {
    "TPU v3": "tpu_v3",
    "TPU v4": "tpu_v4",
    "TPU v5 lite": "tpu_v5e",
    "TPU v5e": "tpu_v5e",
    "TPU v5": "tpu_v5p",
    "TPU v5p": "tpu_v5p",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
}
"""Names in ``CHIPS`` by the ``device_kind`` that JAX reports."""


def chip_of(device_kind: str) -> Chip | None:
    """The chip of a JAX device; None if it is not in the table.

    >>> chip_of("cpu") is None
    True
    """
    name = DEVICE_KINDS.get(device_kind)
    return None if name is None else CHIPS[name]
