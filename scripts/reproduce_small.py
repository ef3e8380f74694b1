"""Trains the models of the small reproduction on Fashion-MNIST, three seeds each.

    python scripts/reproduce_small.py [--workdir runs/reproduce_small] [--jobs 2]

The models are those of scripts/reproduction/variants.py. The script can be stopped at any time and
started again: training resumes.
"""

import argparse
import fnmatch
from pathlib import Path

from experiments import Experiments
from reproduction.variants import SEEDS, STEPS, VARIANTS, train_config

from vmoe.config import to_json
from vmoe.workdir.layout import replace_text


class Reproduction(Experiments):
    """The runs of all variants."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.workdir.absolute(), options.workdir / "results", options.jobs)
        self.steps = options.steps

    def train(self, name: str, seed: int) -> dict[str, str]:
        """Trains what is missing of a run."""
        config = self.workdir / f"{name}.json"
        replace_text(config, to_json(train_config(name, self.steps)))
        workdir = self.workdir / f"{name}-{seed}"
        return {
            "text": self.vmoe("train", "--config", config, "--workdir", workdir, "--seed", seed)
        }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/reproduce_small"))
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--only", default="*", help="names of models, with wildcards")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the standard model")
    return parser.parse_args()


def main() -> None:
    options = parse()
    reproduction = Reproduction(options)
    names = [name for name in VARIANTS if fnmatch.fnmatch(name, options.only)]
    runs = [(name, seed) for seed in options.seeds for name in names]
    for result in reproduction.all(reproduction.train, runs):
        print(result["text"], end="")


if __name__ == "__main__":
    main()
