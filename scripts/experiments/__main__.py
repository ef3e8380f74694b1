"""Runs an experiment, or ``results``, which writes the pages of all."""

import argparse
import importlib

EXPERIMENTS = {
    "baselines": "baselines",
    "check_capacity": "check_capacity",
    "claims": "claims.command",
    "compiled": "compiled",
    "miniature": "miniature",
    "mixtures": "mixtures.command",
    "multitask": "multitask.command",
    "own_images": "own_images",
    "results": "results",
    "routers": "routers",
    "solar": "solar.command",
    "upcycle_and_prune": "upcycle_and_prune",
}
"""The module of each name, whose ``main`` gets the options."""


def main() -> None:
    parser = argparse.ArgumentParser("python -m scripts.experiments", description=__doc__)
    parser.add_argument("name", choices=EXPERIMENTS)
    help_ = "options of the experiment; NAME --help lists them"
    parser.add_argument("options", nargs=argparse.REMAINDER, help=help_)
    given = parser.parse_args()
    importlib.import_module(f"scripts.experiments.{EXPERIMENTS[given.name]}").main(given.options)


if __name__ == "__main__":
    main()
