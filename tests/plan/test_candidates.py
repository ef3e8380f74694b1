"""`vmoe plan` through the real command in a process that has fewer devices than it plans for.

tests/devices has what it prints and refuses once there are devices, and checks its numbers.
"""

import re

import pytest

from tests.command import TINY, forked, vmoe
from vmoe.cli.printing import print_table
from vmoe.config import load
from vmoe.plan.candidates import Candidate, Plan
from vmoe.plan.memory import Memory
from vmoe.plan.table import tables

COMMAND = ("plan", "--config", TINY, "--devices", "2", "--mesh", "expert=2", "--chip", "tpu_v4")


@pytest.mark.process
def test_the_plan_prints_its_assumptions_and_the_memory_with_and_without_remat() -> None:
    result = forked(*COMMAND, environment={"COLUMNS": "60"})
    assert result.returncode == 0, result.stderr
    rows = [line for line in result.stdout.splitlines() if re.match("[─-╿]", line)]
    assert rows and max(map(len, rows)) <= 60
    for word in (
        "parameters",
        "gradients",
        "optimizer",
        "activations",
        "communication",
        "images/s",
    ):
        assert f" {word} " in result.stdout
    for words in ("data=1,expert=2", "(remat)", "all-to-all", "40% of the peak of 275 TFLOP/s"):
        assert words in result.stdout
    assert "data=2" not in result.stdout
    assert "meshes" not in result.stdout  # there is one


def test_the_five_best_of_many_meshes_are_printed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    memory = Memory(*6 * [1_000_000_000], 0, 0, 433e8, 101e8, 1e9, 2e9, remat=False)
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
    assert printed.count("The 5 fastest of 16 meshes") == 2 and "smallest" not in printed
    assert printed.count("data=") == 2 * (5 + 4 + 5)  # in two tables each


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--devices 0", "devices=0: use at least 1"),
        ("--devices 4 --chip h10", "chip=h10: did you mean 'h100'?"),
        ("--devices 8192 --chip tpu_v4", "a pod of tpu_v4 has at most 4096"),
        ("--devices 4 --device-memory 80", "use a number and one of GB"),
    ],
)
def test_wrong_words_are_refused_with_one_line(words: str, message: str) -> None:
    """Before devices are asked for, of which this process may have one."""
    result = vmoe("plan", "--config", TINY, *words.split())
    assert result.returncode == 2 and message in result.stderr, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
