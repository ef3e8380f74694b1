"""Repeats published results of multi-task models: docs/results/multitask.md.

    python scripts/prepare_census.py data/census
    python scripts/prepare_emoji.py data/emoji
    python scripts/multitask.py              # measures what is missing; prints
    python scripts/results.py                # then writes docs/results

    synthetic_MODEL_P     Ma et al. 2018, figure 4: two tasks of relatedness p, 50 seeds at once
    census_PAIR_MODEL     the same, tables 1 and 2: two pairs of tasks on Census-Income, ten seeds
    search_PAIR_MODEL     the search for the settings of each census model, which runs first
    drawings_GATES        category and vendor of emoji, with one gate or two, three seeds

The figures of a run are one committed JSON file, scripts/rows/multitask/EXPERIMENT-SEED.json. A run
with such a file is not repeated. The script can be stopped at any time and started again.
``--tiny`` tries it in seconds.
"""

import json

import flax
import jax
from figures import all_rows, figures_parser, one_row, print_tables
from tasks import show
from tasks.measure import EXPERIMENTS


def main() -> None:
    parser = figures_parser(
        __doc__.splitlines()[0], "multitask", EXPERIMENTS, data="census", emoji="emoji"
    )
    options = parser.parse_args()
    if options.row:
        print(json.dumps(one_row(options, EXPERIMENTS, (flax, jax))))
        return
    rows = all_rows(options, __file__, EXPERIMENTS, ("data", "emoji"))
    print_tables(show.TABLES, rows)


if __name__ == "__main__":
    main()
