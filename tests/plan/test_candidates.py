"""`vmoe plan` through the real command: its output, and errors of one line.

tests/devices/test_plan.py checks its numbers on eight devices.
"""

import json
import math
from pathlib import Path

import pytest

from tests.command import TINY, forked
from vmoe.cli.printing import print_table
from vmoe.config import load, replace
from vmoe.costs.flops import cost
from vmoe.nn.patches import num_tokens
from vmoe.plan.candidates import Candidate, Plan
from vmoe.plan.memory import Memory
from vmoe.plan.table import assumptions, tables

COMMAND = ("plan", "--config", TINY, "--devices", "2", "--mesh", "expert=2", "--chip", "tpu_v4")


@pytest.mark.process
def test_the_plan_prints_its_assumptions_and_the_memory_with_and_without_remat() -> None:
    result = forked(*COMMAND)
    assert result.returncode == 0, result.stderr
    for words in ("data=1,expert=2", "(remat)", "all-to-all", "40% of the peak of 275 TFLOP/s"):
        assert words in result.stdout
    assert "data=2" not in result.stdout
    assert "meshes" not in result.stdout  # there is one
    assert "GPUs" not in result.stdout


def test_the_five_best_of_many_meshes_are_printed_in_lines_of_100_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = Memory(*4 * [1_000_000_000], 0, 433e8, 101e8, remat=False)
    meshes = [
        Candidate(f"data={128 >> i},expert={1 << i}", fsdp, memory, compute_seconds=0.1)
        for i in range(8)
        for fsdp in (False, True)
    ]
    costs = dict(parameters=10**9, active_parameters=1e8, flops=10**15)
    many = Plan(
        load(TINY), 128, "h100", 8e10, **costs, feasible=(*meshes,), infeasible=(*meshes[:4],)
    )
    for title, columns, rows in tables(many):
        print_table(columns, rows, title=title)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.count("The 5 fastest of 16 meshes") == 2 and "smallest" not in printed
    assert printed.count("data=") == 5 + 4 + 5
    assert "compiled for GPUs so far, the compiler needed 1.2 to 1.5" in assumptions(many)[1]


@pytest.mark.process
def test_the_plan_as_json_has_bytes_and_seconds_of_each_candidate() -> None:
    result = forked(*COMMAND, "--json")
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


@pytest.mark.process
def test_a_frozen_part_has_no_gradients_and_no_optimizer_state() -> None:
    frozen = [f"--optim.lr-factors.{part}=0" for part in ("routers", "experts", "others")]
    result = forked(*COMMAND, "--json", *frozen)
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
    "no devices": (["--devices", "0"], 2, "devices=0: use at least 1"),
    "chip": (["--devices", "4", "--chip", "h10"], 2, "chip=h10: did you mean 'h100'?"),
    "pod": (["--devices", "8192", "--chip", "tpu_v4"], 2, "a pod of tpu_v4 has at most 4096"),
    "unit": (["--devices", "4", "--device-memory", "80"], 2, "use a number and one of GB"),
    "memory": (
        ["--devices", "4", "--mesh", "expert=4", "--device-memory", "1kB"],
        1,
        "no mesh of 4 devices fits into ... accumulate (--devices, --batch-size, --accumulate)\n",
    ),
}


@pytest.mark.process
@pytest.mark.parametrize(("words", "status", "message"), CASES.values(), ids=CASES.keys())
def test_an_impossible_plan_is_refused_with_one_line(
    words: list[str], status: int, message: str
) -> None:
    result = forked("plan", "--config", TINY, *words)
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


@pytest.mark.process
def test_the_gain_of_hot_experts_is_that_of_the_last_load_of_a_run(tmp_path: Path) -> None:
    """Experts 0 and 1 are on one device, 2 and 3 on another; by hand."""
    path = tmp_path / "experts.csv"
    path.write_text(LOAD)
    result = forked(*COMMAND, *ROWS, "--json", "--load", str(path))
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


@pytest.mark.process
@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("a,b\n1,2\n", ROWS, "give the experts.csv of a run"),
        ("step,block,expert,load\n", ROWS, "it has no rows yet"),
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
    result = forked(*COMMAND, *options, "--load", str(path))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert message in result.stderr
