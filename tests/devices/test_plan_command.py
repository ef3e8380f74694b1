"""`vmoe plan` through the real command: its numbers as JSON, and errors of one line.

The process has eight devices, so a plan needs none of its own (tests/plan/test_candidates.py).
"""

import json
import math
from pathlib import Path

import pytest

from tests.command import TINY, vmoe
from vmoe.config import load, replace
from vmoe.costs.flops import cost
from vmoe.nn.patches import num_tokens

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
        ["--devices", "4", *("--model.moe.router.dropless", "--model.moe.ragged-all-to-all")],
        2,
        "ragged_all_to_all=True: XLA has it for GPUs and TPUs only; leave it out, or use",
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


LOAD = """step,block,expert,load,importance
5,0,0,0.25,0.25
5,0,1,0.25,0.25
5,0,2,0.25,0.25
5,0,3,0.25,0.25
9,0,0,0.7,0.4
9,0,1,0.1,0.2
9,0,2,0.1,0.2
9,0,3,0.1,0.2
"""
ROWS = ("--model.pooling", "mean", "--model.moe.router.dropless")


def test_the_gain_of_hot_experts_is_that_of_the_last_load_of_a_run(tmp_path: Path) -> None:
    """Experts 0 and 1 are on one device, 2 and 3 on another; by hand."""
    path = tmp_path / "experts.csv"
    path.write_text(LOAD)
    result = vmoe(*COMMAND, *ROWS, "--json", "--load", str(path))
    assert result.returncode == 0, result.stderr
    none, one, two, every = json.loads(result.stdout)["hot_experts"]
    assert [x["experts"] for x in (none, one, two, every)] == [0, 1, 2, 4]
    assert none["busiest"] == none["factor"] == pytest.approx(2 * 0.8)
    assert (one["busiest"], one["factor"]) == pytest.approx((2 * 0.2 + 0.7, 2 * 0.2))
    assert (two["busiest"], two["factor"]) == pytest.approx((2 * 0.2 + 0.8, 2 * 0.2))
    assert (every["busiest"], every["factor"], every["rows_sent"]) == pytest.approx((1, 0, 0))
    model, images = load(TINY).model, load(TINY).batch_size // 2
    rows = images * num_tokens(replace(model, pooling="mean")) * 2 * model.width * 4
    assert none["rows_sent"] == pytest.approx(4 * rows / 2)  # half of them to the other device
    assert one["rows_sent"] == pytest.approx(0.3 * none["rows_sent"])
    assert one["buffers_sent"] == pytest.approx(0.4 * none["rows_sent"])
    expert = 4 * (2 * model.width * model.mlp_dim + model.mlp_dim + model.width)
    assert none["copies_sent"] == 0 and one["copies_sent"] == 2 * expert  # two all-reduces


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (LOAD, (), "no layer without a capacity sends rows of all tokens"),
        (LOAD, (*ROWS, "--mesh", "expert=1"), "mesh=data=2,expert=1: it splits no experts"),
        (LOAD, (*ROWS, "--model.moe.num-experts", "8"), "block 0 has 8 experts here"),
    ],
)
def test_a_load_that_no_hot_expert_can_have_is_refused_with_one_line(
    content: str, options: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "experts.csv"
    path.write_text(content)
    result = vmoe(*COMMAND, *options, "--load", str(path))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
