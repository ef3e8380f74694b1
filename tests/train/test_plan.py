"""`vmoe plan` through the real command: what it prints, and what it refuses in one line.

What its figures are worth is shown on eight devices, in tests/devices/test_plan.py.
"""

import json
import math

import pytest

from tests.command import TINY, vmoe
from vmoe.config import load
from vmoe.costs.flops import cost

PLAN = ("plan", "--config", TINY)


def test_a_plan_ranks_the_meshes_that_fit_and_says_what_the_others_need() -> None:
    words = (*PLAN, "--devices", "2", "--json")
    done = vmoe(*words)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["parameters"] == cost(load(TINY).model).parameters
    assert not found["others"]
    totals = sorted(one["memory"]["total"] for one in found["fit"])
    limit = round(totals[-2])  # what activations take is for the version of JAX to say
    found = json.loads(vmoe(*words, "--device-memory", f"{limit / 1e3}kB").stdout)
    assert [one["memory"]["total"] for one in found["others"]] == totals[-1:]
    assert {one["mesh"] for one in found["others"]} == {"data=2,expert=1"}
    assert all(one["memory"]["total"] <= limit for one in found["fit"])
    assert [one["fsdp"] for one in found["fit"]] == [False, True]
    seconds = [one["seconds"] for one in found["fit"]]
    assert seconds == sorted(seconds) and all(map(math.isfinite, seconds))
    # AdamW keeps two moments of each parameter, and two counts of four bytes.
    memory = found["fit"][0]["memory"]
    assert memory["optimizer"] == 2 * memory["parameters"] + 8


def test_a_plan_prints_its_assumptions_and_both_memories() -> None:
    done = vmoe(*PLAN, "--devices", "2", "--mesh", "expert=2", "--chip", "tpu_v4")
    assert done.returncode == 0, done.stderr
    for words in ("data=1,expert=2", "with remat", "all-to-all", "40% of the peak of 275 TFLOP/s"):
        assert words in done.stdout
    assert "data=2" not in done.stdout


CASES = {
    "batch": (["--devices", "3"], 2, "on 3 devices: each needs as many images; use 30 or 33"),
    "mesh": (["--devices", "4", "--mesh", "expert=3"], 2, "expert may be 1, 2 or 4"),
    "no devices": (["--devices", "0"], 2, "--devices 0: use at least 1"),
    "chip": (["--devices", "4", "--chip", "h10"], 2, "--chip: no 'h10': did you mean 'h100'?"),
    "pod": (["--devices", "8192", "--chip", "tpu_v4"], 2, "a pod of tpu_v4 has at most 4096"),
    "unit": (["--devices", "4", "--device-memory", "80"], 2, "a number and one of GB"),
    "memory": (["--devices", "4", "--device-memory", "1kB"], 1, "no mesh of 4 devices fits into"),
}


@pytest.mark.parametrize(("words", "status", "line"), CASES.values(), ids=CASES.keys())
def test_what_cannot_be_planned_is_refused_in_one_line(
    words: list[str], status: int, line: str
) -> None:
    done = vmoe(*PLAN, *words)
    assert done.returncode == status, done.stderr
    assert line in done.stderr and done.stderr.count("\n") == 1, done.stderr
