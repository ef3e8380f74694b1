"""Measure the cost of sparsity: routing, the layer, whole models, input, start-up, many devices.

The section classic measures EM of vmoe.classic, beside a loop of NumPy, R's flexmix (if installed,
with at most 10,000 rows) and models of scikit-learn.

    python -m scripts.bench                       # all sections, about ten minutes on 2 cores
    python -m scripts.bench layer --tokens 12544 --experts 8 128 --repeats 9
    python -m scripts.bench layer --peer          # also a PyTorch layer, if torch is installed

All variants of a section run in turn in one process, several times. The table shows medians,
interquartile ranges (IQR) and ratios of two medians of the same run. Memory is XLA's estimate of
a program's temporary memory, without its inputs and outputs. The script writes a JSON file and, for
the sections layer and routing, a plot.

    dense MLP        one dense MLP, number of rows = number of choices x capacity factor
    batched experts  only the experts, as one batched product over all slots
    experts alone    only the experts, in the implementation of the layer
    plain            a model that computes every token in every block
    one thread       the input pipeline without reading ahead

In the section data, ms is the time to read all images of a case. A reader (a thread or a worker)
has one core. Without workers, two threads read. The memory of a first batch is the peak of the
process and its workers.
"""

import argparse
import importlib.util
import json
import resource
import sys
from pathlib import Path

from rich.console import Console

from scripts.bench.classic import classic
from scripts.bench.data import data
from scripts.bench.layer import layer
from scripts.bench.measure import Row, machine
from scripts.bench.model import model
from scripts.bench.routing import routing
from scripts.bench.show import plot, table
from scripts.bench.start import parallel, start

SECTIONS = {
    "routing": routing,
    "layer": layer,
    "model": model,
    "data": data,
    "start": start,
    "parallel": parallel,
    "classic": classic,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", help=f"any of {', '.join(SECTIONS)}; all by default")
    parser.add_argument("--experts", type=int, nargs="+", default=[8, 32, 128, 512])
    parser.add_argument("--tokens", type=int, default=3136, help="tokens in a batch")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--hidden", type=int, default=1536, help="hidden width of an expert")
    parser.add_argument(
        "--implementation", default="auto", choices=("auto", "batched", "blocked", "ragged")
    )
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--remat", action="store_true", help="rematerialize the activations of models"
    )
    parser.add_argument("--model", default="vmoe_s32_last2_e8")
    parser.add_argument(
        "--batch", type=int, default=32, help="images in a batch of the model section"
    )
    parser.add_argument(
        "--compile",
        nargs="*",
        default=["vmoe_b16_every2_e8", "vmoe_l16_every2_e32"],
        help="models of 12 and 24 blocks whose compile time is measured",
    )
    parser.add_argument(
        "--images", type=int, default=200, help="JPEG files of the data section, 4 or more"
    )
    parser.add_argument("--rows", type=int, default=100_000, help="rows of the classic section")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--peer", action="store_true", help="also measure a PyTorch layer")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="output path without .json, .png"
    )
    options = parser.parse_args()
    for section in options.sections:
        if section not in SECTIONS:
            parser.error(f"no section {section!r}: choose from {', '.join(SECTIONS)}")
    if options.images < 4:
        parser.error("--images: use 4 or more")
    if options.peer and not all(map(importlib.util.find_spec, ("torch", "transformers"))):
        parser.error("--peer: pip install torch transformers")
    rows: list[Row] = []
    console = Console(width=None if sys.stdout.isatty() else 150)
    for section in options.sections or SECTIONS:
        print(f"measuring: {section}", file=sys.stderr, flush=True)
        section_rows = SECTIONS[section](options)
        console.print(table(section_rows))
        rows += section_rows
    options.out.parent.mkdir(parents=True, exist_ok=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    result = {"machine": machine(), "peak_rss_mb": peak, "rows": [row._asdict() for row in rows]}
    options.out.with_suffix(".json").write_text(json.dumps(result, indent=1))
    written = [options.out.with_suffix(".json")]
    if any(row.section in ("routing", "layer") for row in rows):
        plot(rows, options.out.with_suffix(".png"))
        written.append(options.out.with_suffix(".png"))
    print(f"peak memory of the process: {peak:,.0f} MB; written:", *written)


if __name__ == "__main__":
    main()
