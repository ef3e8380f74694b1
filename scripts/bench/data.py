"""Measure the input pipeline: JPEG files, small images, and the first batch of a large data set.

A reader is a thread or a worker process; each uses one core. Rates are images per second and core.
"""

import argparse
import functools
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from scripts.bench.image_files import write_arrays, write_jpegs
from scripts.bench.loaders import LOADERS
from scripts.bench.measure import Program, Row, rows_of, run_module
from vmoe.config import DataConfig, PreprocessingConfig, TrainConfig, ViTConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.decode import decode
from vmoe.data.pipeline import start_workers, training_batches
from vmoe.data.reading import read_ahead
from vmoe.data.sources import open_source
from vmoe.data.workers import Batches, Workers
from vmoe.host.cores import cores

SIZE, MIN_AREA = 224, 0.05  # crops: side after resizing; minimum share of the image
SMALL, SMALL_BATCH = 28, 256  # as for Fashion-MNIST
BATCHES = 4  # read in a turn
ITEMS = (1_000, 20_000_000)
ONE_THREAD = "one thread"

Ratios = dict[str, list[tuple[str, str]]]


class Variant(NamedTuple):
    """A function that reads the images of a turn, and the number of cores that it uses."""

    run: Callable[[], Any]
    cores: int = 1


def data(options: argparse.Namespace) -> list[Row]:
    user_cache = os.environ.get("XDG_CACHE_HOME", "")
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name  # for the index of the folder; empty is the default
        try:
            with Workers(1) as one, Workers(2) as two:
                workers = {1: one, 2: two}
                rows = _jpegs(Path(name), options, workers) + _small(Path(name), options, workers)
        finally:
            os.environ["XDG_CACHE_HOME"] = user_cache
    return rows + _first_batches(options.repeats)


def _jpegs(folder: Path, options: argparse.Namespace, workers: dict[int, Workers]) -> list[Row]:
    """Our pipeline with both decoders, and the loaders of other libraries that are installed."""
    batch = options.images // BATCHES
    count = batch * BATCHES
    w, h = write_jpegs(folder, count)
    variants, ratios = _other_loaders(folder / "train", batch)
    stages, of_stages = _stages(f"folder:{folder}", count)
    for decoder in ("fast", "exact"):  # each is inserted in front
        config = DataConfig(
            decoder=decoder,
            crop_min_area=MIN_AREA,
            flip=True,
            preprocessing=PreprocessingConfig("tf_bilinear", exif=False),
        )
        ours, to = _variants(f"folder:{folder}", config, SIZE, batch, workers, f"{decoder}, ")
        variants, ratios = ours | variants, ratios | to
    case = {"JPEGs": f"{w}x{h}", "crop": SIZE, "images": count}
    return _rows(case, count, variants | stages, options.repeats, ratios | of_stages)


def _stages(name: str, count: int) -> tuple[dict[str, Variant], Ratios]:
    """Parts of the work of one thread: reading files, and decoding whole ones."""
    source = open_source(name, "train")
    files = [source[i] for i in range(count)]
    fast = functools.partial(simplejpeg.decode_jpeg, fastdct=True, fastupsample=True)
    variants = {
        "files alone": Variant(lambda: [source[i] for i in range(count)]),
        "fast, decoded alone": Variant(lambda: [fast(file.image) for file in files]),
        "exact, decoded alone": Variant(
            lambda: [decode(file.image, file.origin, exif=False) for file in files]
        ),
    }
    both = [(f"{decoder}, {ONE_THREAD}", "") for decoder in ("fast", "exact")]
    one_each = zip(variants, (both, both[:1], both[1:]), strict=True)
    return variants, dict(one_each)


def _other_loaders(folder: Path, batch: int) -> tuple[dict[str, Variant], Ratios]:
    """The installed libraries, and our pipeline relative to them."""
    variants = {}
    for package, loader in LOADERS.items():
        if importlib.util.find_spec(package):
            variants[package] = Variant(loader(folder, batch, SIZE, MIN_AREA, BATCHES))
        else:
            print(f"data: {package} is not installed and left out", file=sys.stderr)
    exact, fast = f"exact, {ONE_THREAD}", f"fast, {ONE_THREAD}"
    ratios = {fast: [(exact, ""), *((package, "<= 1.00") for package in variants)]}
    if variants:
        ratios[exact] = [(package, "") for package in variants]
    return variants, ratios


def _small(folder: Path, options: argparse.Namespace, workers: dict[int, Workers]) -> list[Row]:
    """Images of the size of Fashion-MNIST, where the fixed cost per image shows."""
    count = BATCHES * SMALL_BATCH
    name = write_arrays(folder, count, SMALL)
    variants, ratios = _variants(name, DataConfig(), SMALL, SMALL_BATCH, workers)
    source = open_source(name, "train")
    variants["examples alone"] = Variant(lambda: [source[i] for i in range(count)])
    ratios["examples alone"] = [(ONE_THREAD, "")]
    case = {"arrays": f"{SMALL}x{SMALL}", "images": count}
    return _rows(case, count, variants, options.repeats, ratios)


def _variants(
    name: str,
    config: DataConfig,
    size: int,
    batch: int,
    workers: dict[int, Workers],
    prefix: str = "",
) -> tuple[dict[str, Variant], Ratios]:
    """Our pipeline in this thread, and with reading ahead, relative to this thread."""
    model = ViTConfig(image_size=size, patch_size=size, num_classes=10)
    train = TrainConfig(model=model, data=config, batch_size=batch)
    source = open_source(name, "train")
    batches = training_batches(source, train)
    workers = {0: start_workers(0, source, batch, Preprocessing(size))} | workers
    alone = f"{prefix}{ONE_THREAD}"
    variants = {alone: Variant(lambda: [batches[i] for i in range(BATCHES)])}
    for count, processes in workers.items():
        used = min(len(processes.readers(batches)), cores())
        variants[f"{prefix}{_named(count)}"] = Variant(_reading_ahead(batches, processes), used)
    return variants, {what: [(alone, "")] for what in variants if what != alone}


def _named(workers: int) -> str:
    return f"{workers} worker{'' if workers == 1 else 's'}"


def _reading_ahead(batches: Batches, workers: Workers) -> Callable[[], None]:
    def run() -> None:
        with read_ahead(batches, 0, BATCHES, workers) as reader:
            for _ in reader:
                pass

    return run


def _rows(
    case: dict[str, Any], images: int, variants: dict[str, Variant], repeats: int, ratios: Ratios
) -> list[Row]:
    programs = {what: Program(variant.run) for what, variant in variants.items()}
    rows = []
    for row in rows_of("data", case, programs, repeats, ratios):
        cores = variants[row.what].cores
        assert row.ms
        rate = images / (row.ms / 1e3) / cores
        rows.append(row._replace(temp_mb=None, cores=cores, rate=rate))
    return rows


def _first_batches(repeats: int) -> list[Row]:
    """The time to the first batch and the peak memory, for few and many images; medians."""
    rows = []
    row = functools.partial(Row, "data", {"synthetic images": "first batch"}, iqr_ms=None)
    for workers in (0, 2):
        turns = [
            [run_module("scripts.bench.first_batch", str(n), str(workers)) for n in ITEMS]
            for _ in range(repeats)
        ]
        times = [[each["ms"] for each in turn] for turn in turns]
        peaks = [[sum(each["mb"]) for each in turn] for turn in turns]
        (few_ms, ms), (few_mb, mb) = (np.median(each, 0).tolist() for each in (times, peaks))
        to, what = (f"{n:,}, {_named(workers)}" for n in ITEMS)
        rows += [
            row(to, few_ms, temp_mb=few_mb),
            row(what, ms, ratio=ms / few_ms, to=to, temp_mb=mb),
            row(f"memory: {what}", None, ratio=mb / few_mb, to=to, target="<= 1.05", temp_mb=mb),
        ]
    return rows
