"""`vmoe plan` through the real command: what it prints, and what it refuses in one line.

That its numbers are right is shown on eight devices, in tests/devices/test_plan.py.
"""

import json
import math

import pytest

from tests.command import TINY, vmoe
from vmoe.config import load
from vmoe.costs.flops import cost

COMMAND = ("plan", "--config", TINY, "--devices", "2", "--mesh", "expert=2", "--chip", "tpu_v4")


def test_the_plan_prints_its_assumptions_and_the_memory_with_and_without_remat() -> None:
    done = vmoe(*COMMAND)
    assert done.returncode == 0, done.stderr
    for words in ("data=1,expert=2", "with remat", "all-to-all", "40% of the peak of 275 TFLOP/s"):
        assert words in done.stdout
    assert "data=2" not in done.stdout


def test_the_plan_as_json_has_bytes_and_seconds_of_each_candidate() -> None:
    done = vmoe(*COMMAND, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == cost(load(TINY).model).parameters
    assert not found["infeasible"]
    (candidate,) = found["feasible"]
    times = [candidate[f"{name}_seconds"] for name in ("compute", "update", "communication")]
    assert math.isclose(candidate["step_seconds"], sum(times)) and all(times)
    sent = [one["bytes_sent"] * one["times"] for one in candidate["communications"]]
    assert math.isclose(candidate["bytes_sent"], sum(sent))
    # AdamW holds two moments of each parameter, and two counts of four bytes.
    memory = candidate["memory"]
    assert memory["opt_state"] == 2 * memory["parameters"] + 8


CASES = {
    "batch": (["--devices", "3"], 2, "batch_size=32 on 3 devices"),
    "mesh": (["--devices", "4", "--mesh", "expert=3"], 2, "expert can be 1, 2 or 4"),
    "no devices": (["--devices", "0"], 2, "devices=0: use at least 1"),
    "chip": (["--devices", "4", "--chip", "h10"], 2, "no chip 'h10': did you mean 'h100'?"),
    "pod": (["--devices", "8192", "--chip", "tpu_v4"], 2, "a pod of tpu_v4 has at most 4096"),
    "unit": (["--devices", "4", "--device-memory", "80"], 2, "use a number and one of GB"),
    "memory": (["--devices", "4", "--device-memory", "1kB"], 1, "no mesh of 4 devices fits into"),
}


@pytest.mark.parametrize(("words", "status", "message"), CASES.values(), ids=CASES.keys())
def test_a_plan_that_cannot_be_made_is_refused_with_one_line(
    words: list[str], status: int, message: str
) -> None:
    done = vmoe("plan", "--config", TINY, *words)
    assert done.returncode == status, done.stderr
    assert message in done.stderr and done.stderr.count("\n") == 1, done.stderr
