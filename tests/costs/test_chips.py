"""Times of collectives at published bandwidths, compared with sums by hand."""

from vmoe.costs.chips import CHIPS
from vmoe.costs.collectives import Collective


def test_collectives_that_leave_an_nvlink_domain_use_the_network() -> None:
    chip = CHIPS["h100"]  # domains of 8, 450 GB/s inside, 50 GB/s per device between them
    inside, across = tuple(range(8)), tuple(range(32))
    assert chip.collective_seconds(Collective("all-to-all", 450e9, inside)) == 1
    assert chip.collective_seconds(Collective("all-to-all", 31e9, across)) == 24e9 / 50e9
    # A ring leaves a domain over the network links of all its members: 8 here, or 1 below.
    assert chip.collective_seconds(Collective("all-reduce", 400e9, across)) == 1
    assert chip.collective_seconds(Collective("all-reduce", 50e9, (0, 8, 16, 24))) == 1
