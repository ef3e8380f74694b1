"""Checks claims on sparse models at a small scale: Fashion-MNIST, 14 models, three seeds each.

    python scripts/reproduce_small.py             # trains and measures what is missing; prints
    python scripts/reproduce_small.py --write     # also writes the section of configs/README.md

The models are those of scripts/reproduction/variants.py, the figures those of measure.py, the
claims and the rule for a verdict those of claims.py. A run's figures, and which images are correct
for those that claims compare, are one committed JSON file, configs/reproduce_small/MODEL-SEED.json;
a run that has one is neither trained nor measured again. A file of an earlier version, which does
not say which images are correct, is replaced.

The script can be stopped at any time and started again: training resumes.
"""

import argparse
import fnmatch
import json
import os
from pathlib import Path

from experiments import ROOT, Experiments, Result
from reproduction.claims import compared
from reproduction.rows import Rows, check_row, read_rows, versions, write_section
from reproduction.show import plot, section
from reproduction.variants import SEEDS, STEPS, VARIANTS, train_config

from vmoe.config import to_json
from vmoe.costs.flops import cost
from vmoe.data.pipeline import ORDER
from vmoe.workdir.layout import replace_text

MEASURE = ROOT / "scripts" / "reproduction" / "measure.py"


class Reproduction(Experiments):
    """The runs of all variants, and their rows."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options.workdir.absolute(), options.rows.absolute(), options.jobs)
        self.steps, self.images, self.data = options.steps, options.images, options.data

    def row(self, name: str, seed: int) -> Result:
        """The row of a run, which is trained and measured if it has none.

        Raises:
            SystemExit: the row was made with other settings.
        """
        config = train_config(name, self.steps, self.data)
        settings = {"steps": config.steps, "images": self.images, "order": ORDER}

        def run() -> Result:
            workdir, recipe = self.workdir / f"{name}-{seed}", self.workdir / f"{name}.json"
            replace_text(recipe, to_json(config))
            self.vmoe("train", "--config", recipe, "--workdir", workdir, "--seed", seed)
            measured = json.loads(self.python(MEASURE, workdir, "--images", self.images))
            every = measured.pop("correct")
            correct = {figure: every[figure] for figure in sorted(compared(name) & every.keys())}
            costs = cost(config.model)
            return {
                "model": name,
                "seed": seed,
                **settings,
                "parameters": costs.parameters,
                "flops_per_image": costs.flops_per_image,
                "versions": versions(workdir),
                **measured,
                "correct": correct,
            }

        row = self.once(f"{name}-{seed}", run, needs="correct")
        check_row(row, settings, self.results / f"{name}-{seed}.json")
        return row


def write(rows: Rows, folder: Path, readme: Path) -> None:
    """Writes the plots beside the rows, and the section between the markers of a file.

    Raises:
        SystemExit: the file has no markers.
    """
    plots = [os.path.relpath(path, readme.parent) for path in plot(rows, folder)]
    write_section(readme, "reproduce_small.py", section(rows, plots))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=Path, default=ROOT / "runs" / "reproduce_small")
    parser.add_argument("--rows", type=Path, default=ROOT / "configs" / "reproduce_small")
    parser.add_argument("--data", help="in the form of --data.name; default: fashion_mnist")
    parser.add_argument("--jobs", type=int, default=2, help="commands at a time")
    parser.add_argument("--only", default="*", help="names of models, with wildcards")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS, help="of the standard model")
    parser.add_argument("--images", type=int, default=10_000, help="of the test split")
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=ROOT / "configs" / "README.md",
        help="file with the section to replace; plots are written beside the rows",
    )
    return parser.parse_args()


def main() -> None:
    options = parse()
    reproduction = Reproduction(options)
    names = [name for name in VARIANTS if fnmatch.fnmatch(name, options.only)]
    reproduction.all(reproduction.row, [(name, seed) for seed in options.seeds for name in names])
    rows = read_rows(reproduction.results)
    print(section(rows, ()))
    if options.write:
        write(rows, reproduction.results, options.write)


if __name__ == "__main__":
    main()
