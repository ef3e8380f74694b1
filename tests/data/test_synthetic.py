"""Synthetic images, and what wraps any source: other labels, some of the images."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vmoe.class_names import class_names, synsets
from vmoe.data.decode import decode
from vmoe.data.sources import name_and_split, open_source, relabel, sample
from vmoe.errors import UsageError


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
        (f"synthetic:{2**32}", "has 4,294,967,296 examples, and Grain shuffles fewer than 4,294"),
    ],
)
def test_synthetic_data_out_of_range_is_refused(name: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_source(name, "train")
    assert len(open_source(f"synthetic:{2**32 - 1}", "train")) == 2**32 - 1


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


def test_folders_named_by_numbers_have_the_classes_of_an_imagenet_model(tmp_path: Path) -> None:
    """As those of ImageNet-V2."""
    for number in (0, 10, 207):
        (tmp_path / "test" / str(number)).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "test" / str(number) / "0.png")
    source = open_source(f"folder:{tmp_path}", "test")
    relabelled = relabel(source, class_names("imagenet_1k"))
    assert [relabelled.labels_of(i) for i in range(3)] == [(0,), (10,), (207,)]
    with pytest.raises(UsageError, match="not trained on, '0'"):
        relabel(source, ("cat", "dog"))
    (tmp_path / "test" / "1000").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "test" / "1000" / "0.png")
    with pytest.raises(UsageError, match="not trained on, '1000'"):
        relabel(open_source(f"folder:{tmp_path}", "test"), class_names("imagenet_1k"))
    assert len(synsets("imagenet_1k")) == 1000


def test_labels_pass_through_relabelling_and_samples_and_both_pickle(tmp_path: Path) -> None:
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
