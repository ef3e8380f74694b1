"""What accelerators can do, as their makers published it: of one device, as JAX counts them.

    TPU v3    https://cloud.google.com/tpu/docs/v3; links: Jouppi et al., "A Domain Specific
              Supercomputer for Training Deep Neural Networks", CACM 2020: 4 of 656 Gbit/s. JAX
              counts a chip's two cores; each is given half of the chip.
    TPU v4    https://cloud.google.com/tpu/docs/v4; links: Jouppi et al., "TPU v4", ISCA 2023,
              table 4: 6 of 50 GB/s.
    TPU v5e   https://cloud.google.com/tpu/docs/v5e: links of 400 GB/s in both directions, network
              of 6.4 Tbit/s for a pod of 256
    TPU v5p   https://cloud.google.com/tpu/docs/v5p: links of 1,200 GB/s in both directions, network
              of 50 Gbit/s a chip
    A100      NVIDIA A100 80GB SXM and DGX A100 datasheets: NVLink of 600 GB/s in both directions,
              8 x 200 Gbit/s between hosts
    H100      NVIDIA H100 SXM and DGX H100 datasheets: NVLink of 900 GB/s in both directions,
              8 x 400 Gbit/s between hosts; peak without sparsity
    H200      NVIDIA H200 SXM and DGX H200 datasheets: as the H100, with other memory

Bandwidths here are of one direction.
"""

import dataclasses

from vmoe.costs.collectives import Collective

GB = 1e9


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device and its links. Bandwidths in bytes a second, sent by one device."""

    peak: float
    """Of bfloat16 products, FLOP/s."""
    memory: float
    """Bytes."""
    memory_bandwidth: float
    island: int
    """How many devices the fast links join at most: a host's GPUs, a pod's chips."""
    link: float
    """Over the fast links."""
    network: float | None
    """Between islands; None where none is published."""

    def seconds(self, collective: Collective) -> float:
        """What an exchange takes at the published bandwidth, nothing else going on.

        A ring over several islands leaves each by the networks of all its members there; in an
        all-to-all each device sends by its own what others' islands get.
        """
        home = collective.group[0] // self.island
        inside = sum(device // self.island == home for device in collective.group)
        if inside == len(collective.group):
            return collective.sent / self.link
        network = self.network or 0.0
        if collective.kind == "all-to-all":
            others = len(collective.group) - inside
            out = collective.sent * others / (len(collective.group) - 1)
            return max(out / network, (collective.sent - out) / self.link)
        return collective.sent / min(self.link, inside * network)


CHIPS = {
    "tpu_v3": Chip(61.5e12, 16 * 2.0**30, 450 * GB, 2048, 164 * GB, None),
    "tpu_v4": Chip(275e12, 32 * 2.0**30, 1200 * GB, 4096, 300 * GB, None),
    "tpu_v5e": Chip(197e12, 16 * GB, 819 * GB, 256, 200 * GB, 3.125 * GB),
    "tpu_v5p": Chip(459e12, 95 * GB, 2765 * GB, 8960, 600 * GB, 6.25 * GB),
    "a100": Chip(312e12, 80 * GB, 2039 * GB, 8, 300 * GB, 25 * GB),
    "h100": Chip(989e12, 80 * GB, 3350 * GB, 8, 450 * GB, 50 * GB),
    "h200": Chip(989e12, 141 * GB, 4800 * GB, 8, 450 * GB, 50 * GB),
}
