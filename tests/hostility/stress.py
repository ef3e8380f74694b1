"""Attack the real commands at random, and count lost signals, silent damage and tracebacks.

    python -m tests.hostility stress [--signals 100] [--tables 30] [--seed 0]

    signals      SIGINT or SIGTERM at a random moment of train, evaluate and predict, from their
                 first statement to their end: each must end at once (130, 143), or stop after a
                 step (75); the run is resumed by the next command and completed at the end
    checkpoint   every file of a checkpoint damaged in six ways: each must raise an error
    images       twenty broken images of all kinds in a folder: all must be listed before training
    tables       each CSV file of a run cut or changed at random places: each must cause an error of
                 one line and stay unchanged, or be completed to the same rows

Prints a line per part. ``lost`` counts signals that did not end the command, ``silent`` damage that
was accepted; the exit status is 0 if all counts are 0, else 1.
"""

import argparse
import collections
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from tests.command import ROOT, interpreter
from tests.hostility import TINY
from tests.run_folder import rows
from vmoe.checkpoints.checksums import checksums
from vmoe.checkpoints.restore import CorruptCheckpoint, restore
from vmoe.train.state import abstract_state, checkpoint_items
from vmoe.workdir.layout import TABLES, read_config

GRACE = 0.3  # seconds within which a command that has done its work ends after a signal
Counts = collections.Counter  # cases, lost, silent, tracebacks


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """Starts the real command in the same way as ``interpreter``."""
    return subprocess.Popen(
        [sys.executable, "-m", "vmoe", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def wait_for_first_statement(process: subprocess.Popen[str]) -> None:
    """Waits until the command handles SIGTERM, which Python itself does not."""
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = status.read_text().splitlines()
        caught = next((line.split()[1] for line in lines if line.startswith("SigCgt")), "0")
        if int(caught, 16) >> (signal.SIGTERM - 1) & 1:
            return
        time.sleep(0.001)


def attack_signals(folder: Path, finished: Path, count: int, rng: random.Random) -> Counts:
    image = folder / "image.png"
    Image.new("RGB", (8, 8)).save(image)
    commands: dict[str, list[str | Path]] = {
        "train": ["train", "--config", TINY, "--steps", "4000", "--workdir"],
        "evaluate": ["evaluate", "--checkpoint", finished],
        "predict": ["predict", "--checkpoint", finished, image],
    }
    durations = {"train": 6.0}  # the run takes longer, and each folder gets four signals
    for name in ("evaluate", "predict"):
        begin = time.monotonic()
        interpreter(*commands[name])
        durations[name] = time.monotonic() - begin
    counts, statuses = Counts(), Counts()
    i = 0
    while counts["cases"] < count:
        name = ("train", "train", "evaluate", "predict")[i % 4]
        number = rng.choice([signal.SIGINT, signal.SIGTERM])
        workdir = [folder / f"run{i // 8}"] if name == "train" else []
        i += 1
        process = start(*commands[name], *workdir)
        wait_for_first_statement(process)
        time.sleep(rng.uniform(0, durations[name]))
        if name != "train" and process.poll() is not None:
            statuses["ended before the signal"] += 1
            continue
        process.send_signal(number)
        begin = time.monotonic()
        _, stderr = process.communicate()
        late = time.monotonic() - begin > GRACE
        expected = {128 + number, -number}  # negative: Python had removed the handler at its end
        if name == "train":
            expected.add(75)
        done = process.returncode == 0 and name != "train" and not late
        lost = process.returncode not in expected and not done
        counts.update(cases=1, lost=int(lost), tracebacks=int("Traceback" in stderr))
        statuses[process.returncode] += 1
        if lost or "Traceback" in stderr:
            print(f"{name}, {number.name}: status {process.returncode}: {stderr[-500:]}")
    last = interpreter(*commands["train"], folder / f"run{(i - 1) // 8}")
    status = last.returncode
    counts.update(lost=int(status != 0), tracebacks=int("Traceback" in last.stderr))
    print(f"exit statuses: {dict(statuses)}; resumed to the end with status {status}", flush=True)
    return counts


DAMAGES: dict[str, Callable[[bytes], bytes | None]] = {
    "removed": lambda content: None,
    "emptied": lambda content: b"",
    "cut in half": lambda content: content[: len(content) // 2],
    "last byte cut": lambda content: content[:-1],
    "one bit flipped": lambda content: flip(content, len(content) // 2),
    "zeros": lambda content: bytes(len(content)),
}


def flip(content: bytes, i: int) -> bytes:
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :] if content else b"\1"


def attack_checkpoint(finished: Path) -> Counts:
    step = max((finished / "checkpoints").glob("[0-9]*"), key=lambda path: int(path.name))
    target = checkpoint_items(abstract_state(read_config(finished)))
    whole = checksums(restore(step, **target))
    counts = Counts()
    for path in sorted(path for path in step.rglob("*") if path.is_file()):
        content = path.read_bytes()
        for name, damage in DAMAGES.items():
            damaged = damage(content)
            if damaged == content:
                continue
            path.unlink()
            if damaged is not None:
                path.write_bytes(damaged)
            counts["cases"] += 1
            try:
                accepted = checksums(restore(step, **target)) != whole
                counts["silent"] += accepted
            except CorruptCheckpoint:
                accepted = False
            except Exception as error:  # every other error would be a traceback
                counts["tracebacks"] += 1
                print(f"{path.relative_to(step)}, {name}: {type(error).__name__}: {error}")
            if accepted:
                print(f"{path.relative_to(step)}, {name}: accepted")
            path.write_bytes(content)
    return counts


def broken_images() -> Iterator[tuple[str, bytes]]:
    """Twenty broken image files by name."""
    rng = np.random.default_rng(0)
    pixels = Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8))
    for suffix in ("png", "jpg", "webp", "bmp", "gif", "tif"):
        path = Path(tempfile.gettempdir()) / f"whole-{os.getpid()}.{suffix}"
        pixels.save(path)
        content = path.read_bytes()
        path.unlink()
        yield f"half.{suffix}", content[: len(content) // 2]
        yield f"head.{suffix}", content[:20]
        yield f"end.{suffix}", content[:-40]
    yield "empty.png", b""
    yield "text.jpg", b"not an image"


def attack_images(folder: Path) -> Counts:
    rng = np.random.default_rng(1)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "photos" / name / f"{i}.png")
    broken = dict(broken_images())
    for name, content in broken.items():
        (folder / "photos" / "cat" / name).write_bytes(content)
    arguments = ["train", "--config", TINY, "--workdir", folder / "photos_run"]
    result = interpreter(*arguments, "--data.name", f"folder:{folder / 'photos'}")
    unnamed = [name for name in broken if f"/cat/{name} (" not in result.stderr]
    if unnamed:
        print(f"not named: {', '.join(unnamed)}")
    silent = len(unnamed) + (result.returncode != 2)
    return Counts(cases=len(broken), silent=silent, tracebacks=int("Traceback" in result.stderr))


def attack_tables(folder: Path, finished: Path, count: int, rng: random.Random) -> Counts:
    counts = Counts()
    tables = [name for name in TABLES if (finished / name).exists()]
    whole = {name: (finished / name).read_bytes() for name in tables}
    for i in range(count):
        workdir, name = folder / f"tables{i}", tables[i % len(tables)]
        shutil.copytree(finished, workdir)
        shutil.rmtree(workdir / "checkpoints" / "200")
        place = rng.randrange(len(whole[name]))
        changed = whole[name][:place] if i % 2 else flip(whole[name], place)
        (workdir / name).write_bytes(changed)
        result = interpreter("train", "--config", TINY, "--workdir", workdir)
        status, now, stem = result.returncode, (workdir / name).read_bytes(), Path(name).stem
        refused = status == 1 and now == changed and f"{workdir / name} is corrupt" in result.stderr
        repaired = status == 0 and rows(workdir, stem) == rows(finished, stem)
        counts.update(cases=1, silent=int(not refused and not repaired))
        counts.update(tracebacks=int("Traceback" in result.stderr))
        if not refused and not repaired:
            print(f"{name} at byte {place}: status {status}: {result.stderr[-300:]}")
        shutil.rmtree(workdir)
    return counts


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--signals", type=int, default=100)
    parser.add_argument("--tables", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    rng, total = random.Random(options.seed), Counts()
    columns = ("cases", "lost", "silent", "tracebacks")
    table = Table("attack", *columns)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        finished = folder / "finished"
        run = interpreter("train", "--config", TINY, "--workdir", finished)
        if run.returncode:
            message = f"the run that is attacked ended with status {run.returncode}: {run.stderr}"
            raise SystemExit(message)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for attack, work in {
            "signals": lambda: attack_signals(folder, finished, options.signals, rng),
            "checkpoint": lambda: attack_checkpoint(finished),
            "images": lambda: attack_images(folder),
            "tables": lambda: attack_tables(folder, finished, options.tables, rng),
        }.items():
            print(f"attacking: {attack}", flush=True)
            counts = work()
            table.add_row(attack, *(str(counts[key]) for key in columns))
            total += counts
    Console().print(table)
    bad = sum(total[key] for key in columns[1:])
    print(f"{total['cases']} cases: {bad} lost, silent or with a traceback")
    return 1 if bad else 0
