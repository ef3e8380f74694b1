"""Repeats published results of classic mixtures of experts: docs/results/mixtures.md.

    python scripts/prepare_mixtures.py data/mixtures --debian FOLDER   # see there
    python scripts/mixtures.py              # measures what is missing; prints
    python scripts/mixtures.py --picture    # also draws the two lines of tone perception
    python scripts/results.py               # then writes docs/results

    vowels     Jacobs et al. 1991, table 1: experts and networks tell vowels apart, 25 starts
    arm_...    Jordan & Jacobs 1994, table 1: six methods learn a simulated arm, five draws
    tone, no   how many lines two data sets of R's mixtools have, by BIC and ICL
    stored     the estimators against results of R's flexmix and mixtools on their own data
    trees_...  the soft tree, CART, a forest and boosting: 5x2cv F test and McNemar's test

The figures of a run are one committed JSON file, scripts/rows/mixtures/EXPERIMENT-SEED.json. A run
with such a file is not repeated. The script can be stopped at any time and started again. Rows are
kept apart by their size and by the SHA-256 of their data; ``--tiny`` tries the script in seconds.
"""

import json
from pathlib import Path

import matplotlib
import scipy
import sklearn
from classics import plots, show
from classics.measure import EXPERIMENTS
from experiments import ROOT
from figures import all_rows, figures_parser, one_row, print_tables

PICTURE = ROOT / "docs" / "results" / "mixtures_tone.png"


def main() -> None:
    parser = figures_parser(__doc__.splitlines()[0], "mixtures", EXPERIMENTS, data="mixtures")
    parser.add_argument("--picture", type=Path, nargs="?", const=PICTURE, help="draws to a file")
    options = parser.parse_args()
    if options.row:
        print(json.dumps(one_row(options, EXPERIMENTS, (scipy, sklearn))))
        return
    rows = all_rows(options, __file__, EXPERIMENTS, ("data",))
    print_tables(show.TABLES, rows)
    if options.picture:
        matplotlib.use("Agg")
        plots.tone(rows, options.data).savefig(options.picture, dpi=110)


if __name__ == "__main__":
    main()
