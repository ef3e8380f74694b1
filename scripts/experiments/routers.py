"""Compares gates, routers and experts on the digits: table and plot in docs/results/routers.md.

    python -m scripts.experiments routers            # trains and measures what is missing; prints
    python -m scripts.experiments routers --times    # measures the time of a step; run it alone
    python -m scripts.experiments results            # then writes docs/results

Every model is configs/digits.py with another router, gate or list of experts in its two MoE layers,
for the same number of steps. The figures of a run are a line of
scripts/experiments/rows/routers.jsonl: accuracy on validation and test, the load of the experts,
the dropped choices. router_times.json next to it has the median time of a training step of each
model, all measured in turn in one process. The command can be stopped at any time and started
again.
"""

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib import pyplot

from scripts.experiments.framework.differences import order
from scripts.experiments.framework.pages import jax_versions, markdown_table, wrapped
from scripts.experiments.framework.plots import COLORS, dots
from scripts.experiments.framework.runs import (
    ROOT,
    ROWS,
    SEEDS,
    Comparison,
    Result,
    Rows,
    argument_parser,
    in_steps,
    read_rows,
    versions,
)
from vmoe.config import (
    AuxLossWeights,
    BiasBalanced,
    ConstantExpert,
    CosineGate,
    ExpertChoice,
    ExpertList,
    ExpertRace,
    GatedMlpExpert,
    GShard,
    Hash,
    IdentityExpert,
    MlpExpert,
    MlpGate,
    NoisyGate,
    Random,
    ReLU,
    Sinkhorn,
    Soft,
    Switch,
    TokenChoice,
    TopP,
    TrainConfig,
    Transport,
    TransportExpertChoice,
    ZeroExpert,
    load,
    replace,
)
from vmoe.costs.flops import cost
from vmoe.data.pipeline import ORDER, Batch
from vmoe.routing.aux_losses import NO_LOSSES
from vmoe.train.state import init_state
from vmoe.train.step import make_train_step
from vmoe.workdir.layout import replace_text

CONFIG = ROOT / "configs" / "digits.py"
MODELS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "token_choice": ("token choice, k = 2", {}),
    "naive": (
        "naive top-2: no noise, loss or capacity",
        dict(
            router=TokenChoice(
                noise_std=0.0, normalize_weights=True, aux_loss=NO_LOSSES, dropless=True
            )
        ),
    ),
    "unbalanced": (
        "token choice without losses and noise",
        dict(router=TokenChoice(noise_std=0.0, aux_loss=NO_LOSSES)),
    ),
    "batch_loss": (
        "token choice, losses over the batch",
        dict(router=TokenChoice(aux_loss=AuxLossWeights(over="batch"))),
    ),
    "next_expert": (
        "token choice, overflow to the next expert",
        dict(router=TokenChoice(overflow="next_expert")),
    ),
    "switch": ("Switch, k = 1", dict(router=Switch())),
    "gshard": ("GShard, second choice at random", dict(router=GShard())),
    "bias_balanced": ("bias-balanced: sigmoid scores, no noise", dict(router=BiasBalanced())),
    "bias_softmax": (
        "bias-balanced: softmax scores, no noise",
        dict(router=BiasBalanced(scores="softmax")),
    ),
    "sinkhorn": ("Sinkhorn", dict(router=Sinkhorn())),
    "transport": ("sparse transport, token choice", dict(router=Transport())),
    "transport_expert_choice": (
        "sparse transport, expert choice",
        dict(router=TransportExpertChoice(capacity_factor=2.0)),
    ),
    "relu": ("ReLU", dict(router=ReLU())),
    "top_p": ("top-p", dict(router=TopP())),
    "expert_race": ("expert race", dict(router=ExpertRace())),
    "expert_choice": ("expert choice", dict(router=ExpertChoice(capacity_factor=2.0))),
    "batch_choice": (
        "expert choice over the batch, a threshold in evaluation",
        dict(router=ExpertChoice(capacity_factor=2.0, images_per_group=32, threshold_rate=0.05)),
    ),
    "soft": ("soft", dict(router=Soft(capacity_factor=2.0))),
    "random": ("random experts", dict(router=Random())),
    "hash": ("hash of the position", dict(router=Hash())),
    "noisy": ("token choice, gate with learned noise", dict(gate=NoisyGate())),
    "cosine": ("token choice, cosine gate", dict(gate=CosineGate())),
    "mlp": ("token choice, MLP gate", dict(gate=MlpGate())),
    "shared": ("k = 1 and a shared expert", dict(router=TokenChoice(k=1), shared_experts=1)),
    "gated": ("token choice, gated MLPs", dict(experts=GatedMlpExpert(mlp_dim=85))),
    "zero": (
        "7 MLPs and a zero expert",
        dict(experts=ExpertList(each=(MlpExpert(),) * 7 + (ZeroExpert(),))),
    ),
    "moe_plus_plus": (
        "MoE++: 5 MLPs, zero, identity, constant",
        dict(
            experts=ExpertList(
                each=(*(MlpExpert(),) * 5, ZeroExpert(), IdentityExpert(), ConstantExpert())
            ),
            router=TokenChoice(shares=(*(0.75,) * 5, 1.0, 1.0, 1.0)),
        ),
    ),
    "dense": ("dense", None),
}
"""A label, and the changed fields of the MoE layers; None for a model without any."""
TIMES = "router_times.json"
ROUNDS = 10
"""Rounds of steps, in each of which every model takes a few."""


def train_config(name: str, steps: int | None = None) -> TrainConfig:
    """The config of a model.

    Args:
        steps: replaces the number of steps of the config.
    """
    changes = MODELS[name][1]
    model = dict(sparse_blocks=()) if changes is None else dict(moe=changes)
    return in_steps(replace(load(CONFIG), model=model), steps)


class Routers(Comparison):
    """The runs of all models."""

    needs = "versions"

    def settings(self, model: str) -> Result:
        return {"steps": self.config(model).total_steps, "order": ORDER}

    def config(self, model: str) -> TrainConfig:
        return train_config(model, self.options.steps)

    def measure(self, model: str, seed: int) -> Result:
        config, workdir = self.config(model), self.workdir / f"{model}-{seed}"
        self.train(config, workdir, seed)
        row: Result = {"versions": versions(workdir)}
        for split in ("validation", "test"):
            evaluation = self.evaluated(workdir, f"digits:{split}")
            row |= {split: evaluation["accuracy"], f"images_{split}": evaluation["images"]}
        if config.model.sparse_blocks:
            words = self.vmoe("routing", "--checkpoint", workdir, "--data", "digits:test", "--json")
            blocks = json.loads(words)["blocks"]
            row["dropped"] = float(np.mean([block["dropped"] for block in blocks.values()]))
            row["load"] = {number: block["load"] for number, block in blocks.items()}
        costs = cost(config.model)
        row |= {"parameters": costs.parameters, "flops_per_image": costs.flops_per_image}
        return row


def step_times() -> dict[str, float]:
    """The median time of a training step of each model, in seconds, measured in turn."""
    steps, times = {}, {name: list[float]() for name in MODELS}
    for name in MODELS:
        config = train_config(name)
        side = config.model.image_size
        images = np.zeros((config.batch_size, side, side, 3), np.uint8)
        labels = np.zeros((config.batch_size, 1), np.int32)
        batch = Batch(images, labels, np.ones(config.batch_size, bool))
        program, state = make_train_step(config), init_state(config)
        state, _ = program(state, batch)
        steps[name] = program, batch, state
    for _ in range(ROUNDS):
        for name, (program, batch, state) in steps.items():
            for _ in range(5):
                start = time.perf_counter()
                state, _ = jax.block_until_ready(program(state, batch))
                times[name].append(time.perf_counter() - start)
            steps[name] = program, batch, state
    return {name: statistics.median(of) for name, of in times.items()}


def sections(rows: Rows, times: Mapping[str, float], machine: str) -> dict[str, str]:
    """The sections of docs/results/routers.md about the digits, by name.

    Args:
        machine: where and when the rows and the times were made.
    """
    how = f"`python -m scripts.experiments routers`, {machine}, {jax_versions(rows)}."
    return {"digits": table(rows, times), "how digits": wrapped(how)}


def read_times(rows: Path = ROWS) -> dict[str, float]:
    """The stored times of a step; empty if there are none."""
    file = rows / TIMES
    return json.loads(file.read_text()) if file.exists() else {}


def table(rows: Rows, times: Mapping[str, float]) -> str:
    """The models as a table, the best on validation first."""
    lines = []
    for name in ranked(rows):
        validation, test = (_accuracies(rows, name, split) for split in ("validation", "test"))
        loads = _loads(rows, name)
        dropped = [row["dropped"] for row in rows[name].values() if loads]
        lines.append(
            [
                MODELS[name][0],
                f"{np.mean(validation):.2f}",
                f"{np.mean(test):.2f} ({min(test):.2f} to {max(test):.2f})",
                _compared_with_token_choice(rows, name),
                f"{np.mean(loads):.2f}" if loads else "-",
                f"{100 * np.mean(dropped):.1f}" if loads else "-",
                f"{next(iter(rows[name].values()))['flops_per_image'] / 1e6:.2f}",
                f"{times[name] / times['token_choice']:.2f}" if name in times else "-",
            ]
        )
    columns = ["model", "validation", "test", "test, next to token choice", "largest load / mean"]
    columns += ["dropped, percent", "MFLOPs per image", "time of a step / token choice"]
    return markdown_table(columns, lines)


def ranked(rows: Rows) -> list[str]:
    """The measured models, the best on validation first."""
    return sorted(rows, key=lambda name: -np.mean(_accuracies(rows, name, "validation")))


def plot(rows: Rows, times: Mapping[str, float]) -> Any:
    """Accuracy, load and time of the models, the best on validation at the top."""
    names = ranked(rows)[::-1]
    size = 12, 0.4 + 0.3 * len(names)
    figure, axes = pyplot.subplots(1, 3, figsize=size, layout="constrained", sharey=True)
    for y, name in enumerate(names):
        color = COLORS[0] if MODELS[name][1] is not None else COLORS[4]
        for ax, own in (
            (axes[0], _accuracies(rows, name, "test")),
            (axes[1], _loads(rows, name)),
        ):
            dots(ax, own, y, color)
        if name in times:
            axes[2].barh(y, times[name] / times["token_choice"], 0.6, color=color)
    axes[0].set_yticks(range(len(names)), [MODELS[name][0] for name in names], fontsize=9)
    axes[0].set(xlabel="test accuracy in percent")
    axes[1].set(xlabel="load of the busiest expert / mean")
    axes[2].set(xlabel="time of a step / token choice")
    for ax in axes:
        ax.grid(axis="y", alpha=0.3)
    axes[0].set_ylim(-0.7, len(names) - 0.3)
    axes[0].set_title("dots are seeds, bars are means", fontsize=10)
    axes[1].set_title("dots are seeds and layers", fontsize=10)
    return figure


def _accuracies(rows: Rows, name: str, split: str) -> list[float]:
    return [100 * row[split] for row in rows.get(name, {}).values()]


def _loads(rows: Rows, name: str) -> list[float]:
    """The load of the busiest expert, relative to the mean, by seed and layer."""
    every = [load for row in rows[name].values() for load in row.get("load", {}).values()]
    return [max(load) / np.mean(load) for load in every]


def _compared_with_token_choice(rows: Rows, name: str) -> str:
    """Whether every seed is above, or below, every seed of token choice."""
    own, others = (_accuracies(rows, each, "test") for each in (name, "token_choice"))
    if name == "token_choice" or min(len(own), len(others)) < len(SEEDS):
        return "-"
    return {"none": "within the spread"}.get(text := order(own, others), text)


def main(arguments: Sequence[str]) -> None:
    parser = argument_parser("routers", __doc__, MODELS)
    parser.add_argument("--steps", type=int, help="steps of each run, instead of the config's")
    parser.add_argument("--times", action="store_true", help="measure the time of a step, alone")
    options = parser.parse_args(arguments)
    if options.times:
        replace_text(ROWS / TIMES, json.dumps(step_times(), indent=1) + "\n")
    else:
        Routers(options).run(options.only)
    print(table(read_rows(options.rows), read_times()))
