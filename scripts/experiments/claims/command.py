"""Checks claims on sparse models at a small scale: Fashion-MNIST, models of many seeds.

    python -m scripts.experiments claims        # trains and measures what is missing; prints
    python -m scripts.experiments results       # then writes docs/results

The models are in variants.py, the figures in measure.py, the claims and the rule for a verdict in
verdicts.py, and what was decided before the runs in design.py. A run's figures, and which images
are correct for its accuracy and the figures that claims compare, are a line of
scripts/experiments/rows/claims.jsonl. A run with such a line is neither trained nor measured again.
A line of an earlier version, which does not say which images are correct, is replaced.

The command can be stopped at any time and started again: training resumes.
"""

import json
from collections.abc import Sequence

from scripts.experiments.claims.design import shown
from scripts.experiments.claims.tables import attacked, claims, models
from scripts.experiments.claims.variants import GROUPS, MODELS, STEPS, train_config
from scripts.experiments.claims.verdicts import compared, judge
from scripts.experiments.framework.runs import Comparison, Result, argument_parser, versions
from vmoe.config import TrainConfig
from vmoe.costs.flops import cost
from vmoe.data.pipeline import ORDER

MEASURE = "scripts.experiments.claims.measure"


class Claims(Comparison):
    """The runs of all variants."""

    needs = "correct"

    def config(self, name: str) -> TrainConfig:
        return train_config(name, self.options.steps, self.options.data)

    def settings(self, model: str) -> Result:
        steps = self.config(model).steps
        return {"steps": steps, "images": self.options.images, "order": ORDER}

    def seeds(self, model: str) -> range:
        return range(MODELS[model].seeds)

    def measure(self, model: str, seed: int) -> Result:
        config, workdir = self.config(model), self.workdir / f"{model}-{seed}"
        self.train(config, workdir, seed)
        words = ("--images", self.options.images, "--changes", *MODELS[model].changes)
        measured = json.loads(self.python("-m", MEASURE, workdir, *words))
        every = measured.pop("correct")
        costs = cost(config.model)
        return {
            "parameters": costs.parameters,
            "flops_per_image": costs.flops_per_image,
            "versions": versions(workdir),
            **measured,
            "correct": {name: every[name] for name in sorted(compared(model) & every.keys())},
        }


def main(arguments: Sequence[str]) -> None:
    parser = argument_parser("claims", __doc__, MODELS)
    parser.add_argument("--data", help="in the form of --data.name; default: fashion_mnist")
    parser.add_argument("--steps", type=int, default=STEPS, help="steps of the standard model")
    parser.add_argument("--images", type=int, default=10_000, help="images of the test split")
    options = parser.parse_args(arguments)
    chosen = ([name for name in options.only if name in group] for group in GROUPS)
    rows = shown(Claims(options).run(*chosen))
    print(models(rows), attacked(rows), claims(rows, judge(rows)), sep="\n\n")
