"""Fashion-MNIST is read from a folder and from a server; corrupt copies are an error."""

import functools
import gzip
import hashlib
import os
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.data.open_files import no_more_files
from tests.server import Folder, serving
from vmoe.data.sources import fashion_mnist, open_source
from vmoe.errors import Failure, UsageError
from vmoe.host import retry


@pytest.fixture
def clothes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with 120 images in four files of the published format; patches their checksums."""
    rng, table = np.random.default_rng(0), {}
    folder = tmp_path / "clothes"
    folder.mkdir()
    for name in fashion_mnist.SHA256:
        if "images" in name:
            content = bytes(16) + rng.integers(0, 255, (120, 28, 28), dtype=np.uint8).tobytes()
        else:
            content = bytes(8) + (np.arange(120) % 10).astype(np.uint8).tobytes()
        (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        table[name] = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(fashion_mnist, "SHA256", table)
    monkeypatch.setattr(fashion_mnist, "DEBIAN", tmp_path / "nothing")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def server(clothes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with serving(functools.partial(Folder, directory=str(clothes))) as address:
        monkeypatch.setattr(fashion_mnist, "ADDRESS", address)
        yield clothes


def test_fashion_mnist_from_a_folder_has_ten_evenly_split_classes(clothes: Path) -> None:
    splits = [open_source(f"fashion_mnist:{clothes}", s) for s in ("train", "validation", "test")]
    assert [len(split) for split in splits] == [110, 10, 120]
    assert np.bincount(splits[1].labels).tolist() == [1] * 10
    assert splits[0].class_names[9] == "Ankle boot" and splits[0][0].image.shape == (28, 28, 3)


def test_pickled_fashion_mnist_opens_the_same_folder(clothes: Path) -> None:
    source = open_source(f"fashion_mnist:{clothes}", "validation")
    pickled = pickle.dumps(source)
    assert len(pickled) < 500
    unpickled = pickle.loads(pickled)
    assert unpickled.name == source.name == "fashion_mnist:validation"
    np.testing.assert_array_equal(unpickled.images, source.images)
    np.testing.assert_array_equal(unpickled.labels, source.labels)


def test_fashion_mnist_is_downloaded_once_and_cached(server: Path, tmp_path: Path) -> None:
    downloaded = open_source("fashion_mnist", "test")
    for path in server.iterdir():
        path.unlink()
    again = open_source("fashion_mnist", "test")
    np.testing.assert_array_equal(again.images, downloaded.images)
    names = {path.name for path in (tmp_path / "cache" / "vmoe" / "fashion_mnist").iterdir()}
    assert names == {f"{name}.gz" for name in fashion_mnist.SHA256}, "a partial download is left"


def test_a_failed_or_wrong_download_leaves_no_file_behind(
    server: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = server / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(b"something else"))
    with pytest.raises(UsageError, match="corrupt .its SHA-256 differs"):
        open_source("fashion_mnist", "train")
    path.unlink()
    with pytest.raises(
        UsageError, match=r"cannot be downloaded .*File not found.*: get Fashion-MNIST elsewhere"
    ):
        open_source("fashion_mnist", "train")
    monkeypatch.setattr(fashion_mnist, "ADDRESS", "http://127.0.0.1:1")
    with pytest.raises(Failure, match=r"cannot be downloaded .*refused.*: get Fashion-MNIST"):
        open_source("fashion_mnist", "train")
    cache = Path(os.environ["XDG_CACHE_HOME"]) / "vmoe" / "fashion_mnist"
    assert not list(cache.iterdir())


def test_corrupt_files_of_fashion_mnist_are_refused_by_name(
    clothes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "PAUSES", (0, 0, 0))
    path = clothes / "t10k-labels-idx1-ubyte.gz"
    with no_more_files(), pytest.raises(Failure, match=r"gz: cannot be read now \(Too many open"):
        open_source(f"fashion_mnist:{clothes}", "test")
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte\.gz: corrupt"):
        open_source(f"fashion_mnist:{clothes}", "test")
    path.unlink()
    with pytest.raises(UsageError, match=r"t10k-labels-idx1-ubyte\.gz: no such file"):
        open_source(f"fashion_mnist:{clothes}", "test")
