"""`vmoe plan` through the real command: its numbers as JSON, and errors of one line.

The process has eight devices, so a plan needs none of its own (tests/plan/test_candidates.py).
"""

import json
import math

import pytest

from tests.command import TINY, vmoe
from vmoe.config import load
from vmoe.costs.flops import cost

COMMAND = ("plan", "--config", TINY, "--devices", "2", "--mesh", "expert=2", "--chip", "tpu_v4")


def test_the_plan_as_json_has_bytes_and_seconds_of_each_candidate() -> None:
    result = vmoe(*COMMAND, "--json")
    assert result.returncode == 0, result.stderr
    printed = json.loads(result.stdout)
    assert printed["parameters"] == cost(load(TINY).model).parameters
    assert not printed["infeasible"]
    (candidate,) = printed["feasible"]
    times = [candidate[f"{name}_seconds"] for name in ("compute", "update", "communication")]
    assert math.isclose(candidate["step_seconds"], sum(times)) and all(times)
    sent = [
        collective["bytes_sent"] * collective["times"] for collective in candidate["communications"]
    ]
    assert math.isclose(candidate["bytes_sent"], sum(sent))
    # AdamW holds two moments of each parameter, and two counts of four bytes.
    memory = candidate["memory"]
    assert memory["opt_state"] == 2 * memory["parameters"] + 8


def test_a_frozen_part_has_no_gradients_and_no_optimizer_state() -> None:
    frozen = [f"--optim.lr-factors.{part}=0" for part in ("routers", "experts", "others")]
    result = vmoe(*COMMAND, "--json", *frozen)
    assert result.returncode == 0, result.stderr
    (candidate,) = json.loads(result.stdout)["feasible"]
    head = 4 * (16 * 10 + 10)  # bytes of a kernel and a bias
    assert candidate["memory"]["gradients"] == head
    assert candidate["memory"]["opt_state"] == 2 * head + 8


CASES = {
    "batch": (["--devices", "3"], 2, "batch_size=32: each of 3 devices"),
    "mesh": (["--devices", "4", "--mesh", "expert=3"], 2, "expert can be 1, 2 or 4"),
    "ragged": (
        ["--devices", "4", *("--model.moe.router.dropless", "--model.moe.exchange.ragged")],
        2,
        "exchange.ragged=True: XLA has it for GPUs and TPUs only; leave it out, or use",
    ),
    "memory": (
        ["--devices", "4", "--mesh", "expert=4", "--device-memory", "1kB"],
        1,
        "no mesh of 4 devices fits into ... accumulate (--devices, --batch-size, --accumulate)\n",
    ),
}


@pytest.mark.parametrize(("words", "status", "message"), CASES.values(), ids=CASES.keys())
def test_an_impossible_plan_is_refused_with_one_line(
    words: list[str], status: int, message: str
) -> None:
    result = vmoe("plan", "--config", TINY, *words)
    assert result.returncode == status, result.stderr
    assert all(part in result.stderr for part in message.split(" ... "))
    assert result.stderr.count("\n") == 1, result.stderr
