"""`vmoe plan --compile` through the real command.

What the compilers of TPUs and GPUs make is tested where the extra ``compilers`` is installed.
"""

import importlib.util
import json
from collections.abc import Mapping
from typing import Any

import pytest

from tests.command import TINY, forked

TPU, GPU = (importlib.util.find_spec(name) for name in ("libtpu", "jax_cuda12_plugin"))


@pytest.mark.process
@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        (["--compile", "v5e:2x4"], 2, "compile=v5e:2x4: use a machine such as tpu:v5e:4x8"),
        (["--compile", "gpu:mi300"], 2, "compile=gpu:mi300: choose from a100, h100, h200, b200"),
        (["--compile", "gpu:h100:0"], 2, "name the GPUs as 8, or hosts and GPUs of each as 4x8"),
        (["--compile", "gpu:h100", "--devices", "2"], 2, "devices=2: leave it out"),
        (["--fsdp"], 2, "give the number of devices, or --compile"),
        (["--fsdp", "--devices", "2"], 2, "fsdp=True: only --compile takes it"),
        pytest.param(
            *(["--compile", "tpu:v5e:2x4"], 1, "libtpu is missing; install it with pip install"),
            marks=pytest.mark.skipif(TPU is not None, reason="libtpu is installed"),
        ),
        pytest.param(
            *(["--compile", "gpu:h100"], 1, "jax-cuda12-plugin is missing; install it with"),
            marks=pytest.mark.skipif(GPU is not None, reason="the plugin is installed"),
        ),
        pytest.param(
            *(["--compile", "tpu:v5e:3x7"], 2, "compile=tpu:v5e:3x7: "),
            marks=pytest.mark.skipif(TPU is None, reason="needs libtpu"),
        ),
    ],
)
def test_a_machine_that_cannot_be_compiled_for_is_one_line(
    options: list[str], status: int, message: str
) -> None:
    result = forked("plan", "--config", TINY, *options)
    assert result.returncode == status, result.stderr
    assert message in result.stderr.splitlines()[-1]


def compiled(machine: str, *more: str, environment: Mapping[str, str] | None = None) -> Any:
    """The report of a small model in bfloat16, as JSON."""
    sizes = ["--model.width", "64", "--model.mlp-dim", "128", "--model.patch-size", "2"]
    sizes += ["--model.moe.router.images-per-group", "8", "--batch-size", "64"]
    options = [*sizes, "--model.dtype", "bfloat16", "--json", *more]
    line = ("plan", "--config", TINY, "--compile", machine, *options)
    result = forked(*line, environment=environment)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check(step: Any) -> None:
    """No dense experts, and no float32 product but of gate, head and the softmax of attention."""
    (experts,) = (part for part in step["parts"] if part["part"] == "experts")
    assert 0 < experts["compiled"] < 1.5 * experts["counted"]
    wide = {part["part"] for part in step["parts"] if part["float32"]}
    assert wide <= {"all", "gate", "head", "attention"}


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(TPU is None, reason="needs libtpu")
def test_the_step_for_a_tpu_has_four_messages_to_and_from_experts_a_sparse_block() -> None:
    report = compiled("tpu:v5e:2x4", "--model.moe.num-experts", "8")
    step, forward = report["programs"]
    assert report["mesh"] == "data=1,expert=8"  # one slice, of two hosts
    for program, messages in ((step, 4), (forward, 2)):
        kinds = [each["kind"] for each in program["collectives"]]
        assert kinds.count("all-to-all") == messages
        assert set(kinds) <= {"all-to-all", "all-reduce"}
        check(program)
        for part in program["parts"]:  # the compiler needs what the traced program needs
            assert part["compiled"] == part["counted"], part


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(TPU is None, reason="needs libtpu")
def test_the_step_for_a_tpu_sends_rows_without_gaps_and_asks_nothing_twice() -> None:
    """Rows and outputs, and their gradients; devices gather only how many rows they send, for which
    the compiler may choose an all-reduce.
    """
    options = ["--model.moe.router.dropless", "--model.moe.exchange.ragged"]
    options += ["--model.pooling", "mean"]  # else only class tokens are sent, in the usual way
    step, forward = compiled("tpu:v5e:2x4", *options)["programs"]
    for program, messages in ((step, 4), (forward, 2)):
        kinds = [each["kind"] for each in program["collectives"]]
        assert kinds.count("ragged-all-to-all") == messages
        assert kinds.count("all-gather") <= 1
        if program is forward:  # in the step, gradients are summed besides
            assert len(kinds) == messages + 1
        assert set(kinds) <= {"ragged-all-to-all", "all-reduce", "all-gather"}
        check(program)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(TPU is None, reason="needs libtpu")
def test_one_part_of_the_slots_travels_on_a_tpu_while_another_is_computed() -> None:
    """The first part to travel and the last one have nothing beside them, in both directions."""
    options = ["--model.moe.exchange.chunks", "2", "--model.pooling", "mean"]
    overlap = {"LIBTPU_INIT_ARGS": "--xla_tpu_enable_async_all_to_all=true"}
    step, _ = compiled("tpu:v5e:2x4", *options, environment=overlap)["programs"]
    check(step)
    sent = [each for each in step["collectives"] if each["kind"] == "all-to-all"]
    assert len(sent) == 8 and sum(each["asynchronous"] for each in sent) >= 4


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.parametrize(
    "machine",
    [
        pytest.param("tpu:v5e:1x1", marks=pytest.mark.skipif(TPU is None, reason="needs libtpu")),
        pytest.param("gpu:h100", marks=pytest.mark.skipif(GPU is None, reason="needs its plugin")),
    ],
)
def test_experts_without_a_capacity_are_not_dense(machine: str) -> None:
    """The other report is of experts with a capacity of their even share, 1.05 by default."""
    dropless, of_64 = "--model.moe.router.dropless", "--model.moe.router.images-per-group=64"
    for with_capacity, without in zip(
        *(compiled(machine, *more)["programs"] for more in ([of_64], [of_64, dropless])),
        strict=True,
    ):
        check(without)
        most, found = (
            next(part["compiled"] for part in program["parts"] if part["part"] == "experts")
            for program in (with_capacity, without)
        )
        assert found < 1.5 * most, (found, most)


@pytest.mark.slow
@pytest.mark.process
@pytest.mark.skipif(GPU is None, reason="needs jax-cuda12-plugin")
def test_the_step_for_a_gpu_has_no_dense_expansion() -> None:
    report = compiled("gpu:h100")
    for program in report["programs"]:
        assert not program["collectives"]
        check(program)
