"""Synthetic images, and views of any source: other labels, some of the images."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vmoe.class_names import class_names, synsets
from vmoe.data.decode import decode
from vmoe.data.sources import name_and_split, open_source, relabel, sample
from vmoe.errors import UsageError

ROOT = Path(__file__).parents[2]
MEGABYTES = 30  # that a process may use beyond what it uses for 1,000 images: 2 bytes for each


def first_batch(items: int) -> dict:
    """The milliseconds to the first batch of synthetic images, and the peak memory in MB of the
    process that trains and of its only worker."""
    command = [sys.executable, "-m", "scripts.bench.first_batch", str(items), "1"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.process
@pytest.mark.slow
def test_twenty_million_images_need_no_more_memory_than_a_thousand() -> None:
    few, many = (first_batch(items) for items in (1_000, 20_000_000))
    assert len(few["mb"]) == len(many["mb"]) == 2 and min(few["mb"]) > 50
    for process, other in zip(many["mb"], few["mb"], strict=True):
        assert process < other + MEGABYTES, (few, many)


def test_synthetic_images_are_a_function_of_split_and_index() -> None:
    source = open_source("synthetic:20000000:32:7", "train")
    assert len(source) == 20_000_000 and source.class_names == tuple("0123456")
    pixels = decode(source[19_999_999].image, "")
    assert pixels.shape == (32, 32, 3) and pixels.std() > 20
    again = pickle.loads(pickle.dumps(source))
    assert again[19_999_999].image == source[19_999_999].image
    with pytest.raises(IndexError):
        source[20_000_000]
    assert again[5].labels == source.labels_of(5) == (5,) and source.labels_of(8) == (1,)
    test = open_source("synthetic:20000000:32:7", "test")
    assert len(test) == 2_000_000
    images = {each[i].image for each in (source, test) for i in range(50)}
    assert len(images) == 100
    assert source.fingerprint() == again.fingerprint() != test.fingerprint()
    assert decode(open_source("synthetic:10", "train")[0].image, "").shape == (224, 224, 3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic", "'synthetic' needs a path"),
        ("synthetic:many", "give synthetic:ITEMS"),
        ("synthetic:10:10:10:10", "give synthetic:ITEMS"),
        ("synthetic:9", "ITEMS is 9; use 10 to"),
        ("synthetic:10:0", "SIZE is 0; use 1 to 4,096"),
        ("synthetic:10:8:9999999", "CLASSES is 9999999; use 1 to 1,000,000"),
    ],
)
def test_synthetic_data_out_of_range_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(name, "train")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("tfds:imagenet2012", ("tfds:imagenet2012", "")),
        ("tfds:imagenet2012:train[:99%]", ("tfds:imagenet2012", "train[:99%]")),
        ("tfds:a/b:1.0.0", ("tfds:a/b:1.0.0", "")),
        ("tfds:a/b:1.0.0:test+train[5:]", ("tfds:a/b:1.0.0", "test+train[5:]")),
        ("tfds:/data/a:test", ("tfds:/data/a", "test")),
        ("synthetic:10:8:test", ("synthetic:10:8", "test")),
        ("tar:a-{0..9}.tar:train", ("tar:a-{0..9}.tar", "train")),
        ("hf:train", ("hf:train", "")),
    ],
)
def test_a_name_may_carry_its_split(text: str, parts: tuple[str, str]) -> None:
    assert name_and_split(text) == parts


@pytest.mark.parametrize("names", [class_names, synsets])
def test_the_thousand_numbers_of_imagenet_are_the_classes_of_its_models(
    names: Callable[[str], tuple[str, ...]], tmp_path: Path
) -> None:
    """As folders the numbers are in the order of their text: 0, 1, 10, 100, as in ImageNet-V2."""
    numbers = sorted(map(str, range(1000)))
    images, labels = np.zeros((1000, 1, 1, 3), np.uint8), np.arange(1000)
    arrays = dict(test_images=images, test_labels=labels, class_names=numbers)
    np.savez(tmp_path / "v2.npz", **arrays)
    source = open_source(f"arrays:{tmp_path / 'v2.npz'}", "test")
    relabeled = relabel(source, names("imagenet_1k"))
    assert [relabeled.labels_of(i) for i in range(1000)] == [(int(each),) for each in numbers]
    assert relabeled.class_names == names("imagenet_1k")


def test_other_numbers_are_no_classes_of_an_imagenet_model() -> None:
    for source in (open_source("digits", "test"), open_source("synthetic:10:8:1001", "test")):
        with pytest.raises(UsageError, match="a class that the model was not trained on, '0'"):
            relabel(source, class_names("imagenet_1k"))


def test_labels_pass_through_relabeling_and_samples_and_both_pickle(tmp_path: Path) -> None:
    labels = np.stack([np.arange(60) % 3, (np.arange(60) % 4) - 1], 1)
    labels[:, 1][labels[:, 1] == labels[:, 0]] = -1
    images = np.zeros((60, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "data.npz", test_images=images, test_labels=labels)
    whole = open_source(f"arrays:{tmp_path / 'data.npz'}", "test")
    some = sample(relabel(whole, ("2", "x", "0", "1")), 20)
    assert some.max_labels == 2 and len(some) == 20
    new = {0: 2, 1: 3, 2: 0}
    index = [int(some[i].origin.split("[")[1][:-1]) for i in range(20)]
    assert index == sorted(set(index))
    for i, origin in enumerate(index):
        expected = tuple(new[label] for label in labels[origin] if label >= 0)
        assert some.labels_of(i) == some[i].labels == expected
    again = pickle.loads(pickle.dumps(some))
    assert [again[i].labels for i in range(20)] == [some[i].labels for i in range(20)]
    assert again.fingerprint() == some.fingerprint() != sample(whole, 20).fingerprint()
