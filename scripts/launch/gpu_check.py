"""Check and measure vmoe on a machine with GPUs, most telling rows first.

    python -m scripts.launch.gpu_check --out runs/gpu                 # eight minutes; resumes
    python -m scripts.launch.gpu_check --out runs/gpu --seconds 3600
    python -m scripts.launch.gpu_check --out runs/try --dry-run       # tiny sizes, on any machine

A process of its own makes each row, and is killed after the row's limit. The row is then written to
OUT/rows.jsonl (of a dry run to dry_run.jsonl). The same command makes the rows that are missing,
then again those that failed; after a change of the code use another folder. OUT/log.txt has the
messages of all rows, OUT/cache their compiled programs.

The table shows medians of several repeats with their interquartile ranges (IQR). A share of the
ceiling is relative to what this card reaches with large operations. The exit status is 0 if all
rows are made, 1 if not, and 75 if a signal ended the command.
"""

import argparse
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from vmoe.cli.printing import four_digits, print_table
from vmoe.host.signals import Signals


class Row(NamedTuple):
    limit: float  # seconds
    function: str  # of gpu_rows
    arguments: tuple[Any, ...] = ()


ROWS = {
    "stored runs": Row(150, "stored_runs"),
    "ceilings": Row(60, "ceilings"),
    "S/32": Row(150, "model", ("S/32",)),
    "B/16": Row(150, "model", ("B/16",)),
    "dense L/16": Row(150, "model", ("L/16", "dense")),
    **{
        f"layer, {capacity}, {name}": Row(60, "layer", (name, capacity))
        for capacity in ("fixed", "dropless")
        for name in ("batched", "ragged", "blocked", "auto")
    },
    "attention": Row(60, "attention"),
    "timm L/16": Row(90, "timm", ("L/16", "dense")),
    "input, S/32": Row(150, "pipeline", ("S/32",)),
    "several devices, S/32": Row(150, "devices", ("S/32",)),
    "dense S/32": Row(150, "model", ("S/32", "dense")),
    "timm S/32": Row(90, "timm", ("S/32", "dense")),
    "dense B/16": Row(150, "model", ("B/16", "dense")),
    "timm B/16": Row(90, "timm", ("B/16", "dense")),
}
FIRST = {row.function: name for name, row in reversed(ROWS.items())}  # of each function
STARTS = multiprocessing.get_context("forkserver")  # imports once for all rows

Made = dict[str, dict[str, Any]]  # the lines of the file by name of the row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    parser.add_argument(
        "--dry-run", action="store_true", help="the first row of each kind, in tiny sizes"
    )
    parser.add_argument("--seconds", type=float, default=480.0, help="for all rows together")
    options = parser.parse_args()
    names = [name for name in ROWS if not options.dry_run or name in FIRST.values()]
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(options.out.absolute() / "cache"))
    STARTS.set_forkserver_preload(["scripts.launch.gpu_rows"])
    file = options.out / ("dry_run.jsonl" if options.dry_run else "rows.jsonl")
    made = _read(file)
    end = time.monotonic() + options.seconds
    failed = [name for name in names if name in made and made[name]["error"]]
    with Signals() as signals:
        for name in [*(name for name in names if name not in made), *failed]:
            left = end - time.monotonic()
            if left <= 0 or signals.requested:
                break
            made[name] = {"row": name, **_measured(name, left, options, signals)}
            with file.open("ab", buffering=0) as lines:  # at once: no signal leaves half a line
                lines.write(f"{json.dumps(made[name])}\n".encode())
            print(f"{name}: {made[name]['seconds']:.0f} s", file=sys.stderr, flush=True)
    complete = _show({name: made[name] for name in names if name in made}, len(names))
    sys.exit(75 if signals.requested else 0 if complete else 1)


def _read(file: Path) -> Made:
    """The rows of a file by name; of several with one name the last one counts."""
    made = {}
    for i, line in enumerate(file.read_text().splitlines() if file.is_file() else (), 1):
        try:
            row = json.loads(line)
            made[row["row"]] = row
        except (ValueError, KeyError, TypeError):
            raise SystemExit(f"{file}, line {i}: no row; remove it") from None
    return made


def _measured(
    name: str, left: float, options: argparse.Namespace, signals: Signals
) -> dict[str, Any]:
    """What a process says of a row, also one that fails or is killed."""
    limit, ended = min(ROWS[name].limit, left), False
    row: dict[str, Any] = {"seconds": 0.0, "machine": {}, "figures": [], "skipped": [], "error": ""}
    log = options.out / "log.txt"
    receiver, sender = STARTS.Pipe(duplex=False)
    process = STARTS.Process(target=_make, args=(name, options.dry_run, log.absolute(), sender))
    process.start()  # the first one waits for the imports
    start = time.monotonic()
    sender.close()  # so that the end of the process is the end of the pipe
    while not ended and row["seconds"] < limit and not signals.requested:
        try:
            if receiver.poll(0.1):
                key, value = receiver.recv()
                row[key] = [*row[key], value] if isinstance(row[key], list) else value
        except EOFError:
            ended = True
        row["seconds"] = time.monotonic() - start
    if not ended:
        process.kill()
        why = signals.requested or ("its limit" if limit < left else "--seconds")
        row["error"] = f"killed after {row['seconds']:.0f} s: {why}"
    process.join()
    if ended and process.exitcode:
        last = log.read_text(errors="replace").splitlines()[-1:]
        row["error"] = " ".join([f"exit status {process.exitcode}:", *last])
    return row


def _make(name: str, tiny: bool, log: Path, sender: Connection) -> None:
    """Makes a row in this process, and sends its parts as they are known."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from scripts.launch import gpu_rows

    row, sizes = ROWS[name], gpu_rows.TINY if tiny else gpu_rows.FULL
    try:
        sender.send(("machine", gpu_rows.about_machine(row.function, tiny)))
        for part in getattr(gpu_rows, row.function)(sizes, *row.arguments):
            skipped = isinstance(part, str)
            sender.send(("skipped", part) if skipped else ("figures", part._asdict()))
    except Exception as error:  # also out of memory, and what the platform does not support
        traceback.print_exc()
        text = str(error).strip().partition("\n")[0]
        sender.send(("error", f"{type(error).__name__}: {text}"))


def _show(made: Made, total: int) -> bool:
    """Prints the table, and what is skipped and failed; returns whether all rows are made."""
    figures = [(name, figure) for name, row in made.items() for figure in row["figures"]]
    ceilings = {figure["unit"]: figure["value"] for name, figure in figures if name == "ceilings"}
    columns = ["row", "median", "IQR", "unit", "of ceiling"]
    print_table(columns, [_cells(name, figure, ceilings) for name, figure in figures])
    machines = [row["machine"] for row in made.values() if row["machine"]]
    for line in dict.fromkeys(", ".join(f"{k} {v}" for k, v in each.items()) for each in machines):
        print(line)
    skipped = [f"{name}: {text}" for name, row in made.items() for text in row["skipped"]]
    failed = [f"{name}: {row['error']}" for name, row in made.items() if row["error"]]
    for what, texts in (("skipped", skipped), ("failed", failed)):
        for text in texts:
            print(f"{what}: {text}")
    whole = len(made) - len(failed)
    print(f"{whole} of {total} rows made, {len(failed)} failed, {len(skipped)} parts skipped")
    return whole == total


def _cells(name: str, figure: Mapping[str, Any], ceilings: Mapping[str, float]) -> list[str]:
    value, iqr, unit = figure["value"], figure["iqr"], figure["unit"]
    share = f"{value / ceilings[unit]:.0%}" if unit in ceilings else ""
    iqr = "" if iqr is None else four_digits(iqr)
    return [f"{name}: {figure['what']}", four_digits(value), iqr, unit, share]


if __name__ == "__main__":
    main()
