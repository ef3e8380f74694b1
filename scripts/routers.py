"""Compares gates, routers and experts on the digits: table and plot in docs/results/routers.md.

    python scripts/routers.py            # trains and measures what is missing; prints
    python scripts/routers.py --times    # measures the time of a step; run it alone
    python scripts/results.py            # then writes docs/results

Every model is configs/digits.py with another router, gate or list of experts in its two MoE layers,
for the same number of steps. The figures of a run are one committed JSON file,
scripts/rows/routers/MODEL-SEED.json: accuracy on validation and test, the load of the experts, the
dropped choices. scripts/rows/router_times.json has the median time of a training step of each
model, all measured in turn in one process. The script can be stopped at any time and started again.
"""

import json
import statistics
import time
from typing import Any

import jax
import numpy as np
from experiments import (
    ROOT,
    ROWS,
    Comparison,
    Result,
    Rows,
    argument_parser,
    markdown_table,
    read_rows,
    versions,
)

from vmoe.config import (
    AuxLossWeights,
    BiasBalanced,
    CosineGate,
    ExpertChoice,
    ExpertList,
    GatedMlpExpert,
    GShard,
    Hash,
    MlpExpert,
    MlpGate,
    NoisyGate,
    Random,
    Soft,
    Switch,
    TokenChoice,
    TrainConfig,
    ZeroExpert,
    load,
    replace,
)
from vmoe.costs.flops import cost
from vmoe.data.pipeline import ORDER, Batch
from vmoe.train.state import init_state
from vmoe.train.step import make_train_step
from vmoe.workdir.layout import replace_text

RECIPE = ROOT / "configs" / "digits.py"
NO_LOSS = AuxLossWeights(importance=0.0, load=0.0)
MODELS: dict[str, tuple[str, dict[str, Any] | None]] = {
    "token_choice": ("token choice, k = 2", {}),
    "naive": (
        "naive top-2: no noise, loss or capacity",
        dict(
            router=TokenChoice(noise_std=0.0, normalize_weights=True, aux_loss=NO_LOSS),
            dropless=True,
        ),
    ),
    "switch": ("Switch, k = 1", dict(router=Switch())),
    "gshard": ("GShard, second choice at random", dict(router=GShard())),
    "bias_balanced": ("balanced by a bias", dict(router=BiasBalanced())),
    "expert_choice": ("expert choice", dict(router=ExpertChoice(), capacity_factor=2.0)),
    "soft": ("soft", dict(router=Soft(), capacity_factor=2.0, images_per_group=1)),
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
    "dense": ("dense", None),
}
"""A label, and the changed fields of the MoE layers; None for a model without any."""
TIMES = ROWS / "router_times.json"
ROUNDS = 10
"""Rounds of steps, in each of which every model takes a few."""


def train_config(name: str) -> TrainConfig:
    """The config of a model."""
    changes, config = MODELS[name][1], load(RECIPE)
    model = dict(sparse_blocks=()) if changes is None else dict(moe=changes)
    return replace(config, model=model)


class Routers(Comparison):
    """The runs of all models."""

    needs = "versions"

    def settings(self, model: str) -> Result:
        return {"steps": train_config(model).steps, "order": ORDER}

    def measure(self, model: str, seed: int) -> Result:
        config, workdir = train_config(model), self.workdir / f"{model}-{seed}"
        self.train(config, workdir, seed)
        row: Result = {"versions": versions(workdir)}
        for split in ("validation", "test"):
            words = self.vmoe(
                "evaluate", "--checkpoint", workdir, "--data", f"digits:{split}", "--json"
            )
            evaluation = json.loads(words)
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


def table(rows: Rows, times: dict[str, float]) -> str:
    """The models as a table, the best on validation first."""
    lines = []
    for name in sorted(rows, key=lambda name: -np.mean(_of(rows, name, "validation"))):
        seeds = rows[name].values()
        loads = [max(load) * len(load) for row in seeds for load in row.get("load", {}).values()]
        drops = [row["dropped"] for row in seeds if "dropped" in row]
        test = _of(rows, name, "test")
        lines.append(
            [
                MODELS[name][0],
                f"{np.mean(_of(rows, name, 'validation')):.2f}",
                f"{np.mean(test):.2f} ({min(test):.2f} to {max(test):.2f})",
                f"{np.mean(loads):.2f}" if loads else "-",
                f"{np.mean(drops):.1%}" if drops else "-",
                f"{next(iter(seeds))['flops_per_image'] / 1e6:.2f}",
                f"{times[name] / times['token_choice']:.2f}" if times else "-",
            ]
        )
    columns = ["model", "validation", "test", "largest load / mean", "dropped"]
    return markdown_table([*columns, "MFLOPs per image", "time of a step / token choice"], lines)


def _of(rows: Rows, name: str, split: str) -> list[float]:
    return [100 * row[split] for row in rows[name].values()]


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0], "routers")
    parser.add_argument("--only", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--times", action="store_true", help="measure the time of a step, alone")
    options = parser.parse_args()
    if options.times:
        replace_text(TIMES, json.dumps(step_times(), indent=1) + "\n")
    else:
        Routers(options).run(options.only)
    times = json.loads(TIMES.read_text()) if TIMES.exists() else {}
    print(table(read_rows(options.rows), times))


if __name__ == "__main__":
    main()
