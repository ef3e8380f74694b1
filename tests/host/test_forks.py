"""Processes that are forked after JAX has run; without the error they would wait for ever."""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import vmoe
from tests import tiny
from vmoe.classic import MixtureOfExpertsRegressor
from vmoe.multitask import MultiTaskEstimator
from vmoe.train import train

pytestmark = pytest.mark.process

MESSAGE = (
    "this process was forked from {}, which has computed by JAX, and would wait for ever: start "
    'processes by multiprocessing.get_context("spawn") or "forkserver", or compute in the forked '
    "ones alone"
)


def in_child(*calls: Callable[[], Any]) -> list[str]:
    """The errors of calls in a forked process."""
    receive, send = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # JAX's own, which is no error
        child = os.fork()
    if child == 0:
        for call in calls:
            try:
                call()
                os.write(send, b"no error\n")
            except BaseException as error:
                os.write(send, f"{error}\n".encode())
        os._exit(0)
    os.close(send)
    with open(receive) as lines:
        found = lines.read().splitlines()
    os.waitpid(child, 0)
    return found


def test_every_door_of_a_forked_process_is_closed_by_one_line(tmp_path: Path) -> None:
    model = vmoe.create_model("vmoe_test_last2_e4", num_classes=3, image_size=16)
    x = np.random.default_rng(0).normal(size=(20, 2))
    tokens = jnp.zeros((1, 4, 32))
    layer = next(block.mlp for block in model.blocks if isinstance(block.mlp, vmoe.MoE))
    found = in_child(
        lambda: vmoe.create_model("vit_test"),
        lambda: vmoe.load(tmp_path),
        lambda: model(np.zeros((1, 16, 16, 3), np.float32)),
        lambda: layer(tokens),
        lambda: train(tiny.config, tmp_path),
        lambda: MultiTaskEstimator().fit(x, {"a": x[:, 0]}),
        lambda: MixtureOfExpertsRegressor(1).fit(x, x[:, 0]).predict(x),  # without JAX
    )
    assert found == [MESSAGE.format(os.getpid())] * 6 + ["no error"]


def test_a_process_that_was_forked_before_any_computation_computes() -> None:
    """In a process of its own, since this one may have computed."""
    code = (
        "import os, vmoe\nfrom vmoe.host import forks\nchild = os.fork()\n"
        "forks.computes()\nif child: print(os.waitpid(child, 0)[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
