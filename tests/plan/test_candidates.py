"""`vmoe plan` through the real command, and the requests that are refused before JAX starts.

That its numbers are right is shown on eight devices, in tests/devices/test_plan.py.
"""

import json
import math
from typing import Any

import pytest

from tests.test_cli import TINY, vmoe
from vmoe.config import load
from vmoe.costs.flops import cost
from vmoe.errors import UsageError
from vmoe.plan.candidates import plan

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


def test_a_refused_plan_is_one_line_with_the_exit_status_of_wrong_usage() -> None:
    done = vmoe("plan", "--config", TINY, "--devices", "4", "--chip", "h10")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "no chip 'h10': did you mean 'h100'?" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"devices": 0}, "devices=0: use at least 1"),
        ({"devices": 4, "chip": "h10"}, "no chip 'h10': did you mean 'h100'"),
        ({"devices": 8192, "chip": "tpu_v4"}, "devices=8192: a pod of tpu_v4 has at most 4096"),
        ({"devices": 4, "device_memory": "80"}, "device_memory=80: use a number and one of GB"),
    ],
)
def test_wrong_arguments_are_refused_with_a_remedy(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan(load(TINY), **arguments)
