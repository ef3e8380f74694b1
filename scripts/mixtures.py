"""Repeats published results of classic mixtures of experts: docs/results/mixtures.md.

    python scripts/prepare_mixtures.py data/mixtures --debian FOLDER   # see there
    python scripts/mixtures.py              # measures what is missing; prints
    python scripts/mixtures.py --picture    # also draws the two lines of tone perception
    python scripts/results.py               # then writes docs/results

    vowels     Jacobs et al. 1991, table 1: experts and networks tell vowels apart, 25 starts
    arm_...    Jordan & Jacobs 1994, table 1: six methods learn a simulated arm, five draws
    tone, no   how many lines two data sets of R's mixtools have, by bic and icl
    stored     the estimators against results of R's flexmix and mixtools on their own data
    trees_...  the soft tree, CART, a forest and boosting: 5x2cv F test and McNemar's test

The figures of a run are one committed JSON file, scripts/rows/mixtures/EXPERIMENT-SEED.json. A run
with such a file is not repeated. The script can be stopped at any time and started again. Rows are
kept apart by their size and by the SHA-256 of their data; ``--tiny`` tries the script in seconds.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import matplotlib
from classics import plots, show
from classics.data import checksum
from classics.measure import EXPERIMENTS, measure
from experiments import ROOT, Comparison, Result, Rows, argument_parser, read_rows

PICTURE = ROOT / "docs" / "results" / "mixtures_tone.png"


class Mixtures(Comparison):
    """The runs of all experiments; each is a command of its own, on its own cores."""

    needs = "figures"

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(options)
        self.data: Path = options.data.absolute()

    def settings(self, model: str) -> Result:
        tables = {name: checksum(self.data, name) for name in EXPERIMENTS[model].tables}
        return {"size": self.options.size, "data": tables}

    def measure(self, model: str, seed: int) -> Result:
        size = ("--tiny",) if self.options.size == "tiny" else ()
        command = (__file__, "--row", model, seed, "--data", self.data, *size)
        return json.loads(self.python(*command))

    def run(self, models: Iterable[str]) -> Rows:
        """As for ``Comparison``; without ``--seeds``, each experiment has its own number."""
        seeds = self.options.seeds
        self.all(
            self.row,
            [
                (model, seed)
                for model in models
                for seed in (range(EXPERIMENTS[model].seeds) if seeds is None else seeds)
            ],
        )
        return read_rows(self.results)


def main() -> None:
    parser = argument_parser(__doc__.splitlines()[0], "mixtures", EXPERIMENTS)
    parser.set_defaults(seeds=None)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "mixtures")
    parser.add_argument("--tiny", dest="size", action="store_const", const="tiny", default="full")
    parser.add_argument("--row", nargs=2, metavar=("EXPERIMENT", "SEED"), help="prints one row")
    parser.add_argument("--picture", type=Path, nargs="?", const=PICTURE, help="draws to a file")
    options = parser.parse_args()
    if options.row:
        name, seed = options.row
        print(json.dumps(measure(name, int(seed), options.data, options.size)))
        return
    if options.size == "tiny" and options.rows == parser.get_default("rows"):
        options.rows = options.workdir / "tiny"  # the committed rows are full ones
    rows = Mixtures(options).run(options.only)
    for title, text in show.tables(rows).items():
        print(f"{title}\n\n{text}\n")
    if options.picture:
        matplotlib.use("Agg")
        plots.tone(rows, options.data).savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
