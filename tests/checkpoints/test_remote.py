"""Models at URLs are downloaded once, and again after a change; what fails is one line.

The servers are fsspec's memory file system and a web server on this machine.
"""

import contextlib
import functools
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.registry import _registry

from tests.command import TINY
from tests.random_models import stored_of
from tests.server import Folder, serving
from vmoe import config as configs
from vmoe.checkpoints import read
from vmoe.checkpoints.remote import url_of
from vmoe.checkpoints.vmoe_format import write
from vmoe.errors import Failure, UsageError
from vmoe.train import train
from vmoe.trees import by_name
from vmoe.workdir.layout import read_init

GOLDEN = Path(__file__).parents[1] / "golden"
PUBLISHED = GOLDEN / "published" / "sharded"
WEIGHTS = GOLDEN / "weights"
MODELS = {  # folder -> what is read in it
    PUBLISHED: "ckpt",
    WEIGHTS / "augreg": "model.npz",
    WEIGHTS / "timm_vit": "",
    WEIGHTS / "hf_vit_shards": "",
}


class Handler(Folder):
    """Serves a folder; leaves out the end of files whose name is in ``cut``."""

    cut: set[str] = set()
    refused: set[str] = set()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if name in self.cut:
            path = Path(self.translate_path(self.path))
            self.send_response(200)
            self.send_header("Content-Length", str(path.stat().st_size))
            self.end_headers()
            self.wfile.write(path.read_bytes()[:100])
        elif name in self.refused:
            self.send_error(403)
        else:
            super().do_GET()

    def do_HEAD(self) -> None:
        if self.path.rpartition("/")[2] in self.refused:
            self.send_error(403)
        else:
            super().do_HEAD()


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The URL of a web server that serves the folder ``web``."""
    with serving_folder(tmp_path / "web") as url:
        yield url


@contextlib.contextmanager
def serving_folder(folder: Path) -> Iterator[str]:
    """The URL of a web server that serves a folder."""
    folder.mkdir(exist_ok=True)
    handler = functools.partial(Handler, directory=str(folder))
    with serving(handler) as address:
        yield address
    Handler.cut, Handler.refused = set(), set()


@pytest.fixture
def memory() -> Iterator[str]:
    """The URL of an empty folder in memory."""
    yield "memory://models"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "vmoe" / "checkpoints"


def upload(folder: Path, url: str) -> None:
    fsspec.filesystem("memory").put(f"{folder}/", f"{url}/", recursive=True)


def files_of(cache: Path) -> dict[str, bytes]:
    return {str(x.relative_to(cache)): x.read_bytes() for x in cache.rglob("*") if x.is_file()}


def assert_same(path: str | Path, original: Path) -> None:
    there, here = read(path), read(original)
    assert there.config == here.config and there.class_names == here.class_names
    assert there.preprocessing == here.preprocessing
    expected = by_name(here.params)
    for name, array in by_name(there.params).items():
        np.testing.assert_array_equal(array, expected[name])


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_model_in_memory_is_downloaded_once_and_equals_the_files(
    folder: Path, memory: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(folder, memory)
    url = f"{memory}/{MODELS[folder]}".rstrip("/")
    assert_same(url, folder / MODELS[folder])
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("downloading ")]
    names = [line.split()[1] for line in lines]
    kept = {Path(x).name for x in files_of(cache)}
    assert sorted(names) == sorted(x for x in kept if not x.endswith(".remote.json"))
    assert all(f"from {memory}/{n}, " in x for n, x in zip(names, lines, strict=True))
    assert f"{(folder / names[0]).stat().st_size:,} bytes" in lines[0]
    assert "expected.npz" not in names
    assert_same(Path(url), folder / MODELS[folder])  # a Path has one slash less
    assert "downloading" not in capsys.readouterr().err
    assert read(url).origin.path == url


def test_a_file_that_has_changed_is_downloaded_again_and_alone(
    memory: str, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(WEIGHTS / "timm_vit", memory)
    first = read(memory)
    text = (WEIGHTS / "timm_vit" / "config.json").read_text().replace('"plum"', '"pawpaw"')
    fsspec.filesystem("memory").pipe(f"{memory}/config.json", text.encode())
    capsys.readouterr()
    assert read(memory).class_names == ("pawpaw", *first.class_names[1:])
    err = capsys.readouterr().err
    assert "downloading config.json" in err and err.count("downloading") == 1


def test_a_file_whose_record_is_damaged_is_downloaded_again(
    memory: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    upload(WEIGHTS / "timm_vit", memory)
    read(memory)
    next(cache.rglob("model.safetensors.remote.json")).write_bytes(b"\xff")
    capsys.readouterr()
    assert_same(memory, WEIGHTS / "timm_vit")
    assert capsys.readouterr().err.count("downloading model.safetensors ") == 1


def test_a_file_that_is_no_longer_there_is_not_read_from_the_cache(memory: str) -> None:
    upload(WEIGHTS / "hf_vit", memory)
    assert read(memory).origin.assumed == ()
    fsspec.filesystem("memory").rm(f"{memory}/preprocessor_config.json")
    assert "images resized by" in read(memory).origin.assumed[0]
    fsspec.filesystem("memory").rm(f"{memory}/model.safetensors")
    with pytest.raises(UsageError, match="memory://models: no checkpoint there"):
        read(memory)


def test_a_model_that_the_disk_has_no_room_for_is_no_wrong_input(memory: str, cache: Path) -> None:
    """A limit on the file size is like a full disk."""
    upload(WEIGHTS / "timm_vit", memory)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(Failure, match=f"^{memory}/model.safetensors: cannot be downloaded"):
            read(memory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files_of(cache) == {}


@pytest.mark.parametrize("folder", [PUBLISHED, WEIGHTS / "timm_vit"], ids=lambda x: x.name)
def test_a_model_on_a_web_server_equals_the_files(folder: Path, web: str, tmp_path: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / "web" / file.name).write_bytes(file.read_bytes())
    assert_same(f"{web}/{MODELS[folder]}".rstrip("/"), folder / MODELS[folder])


def test_a_truncated_transfer_is_refused_and_leaves_nothing(
    web: str, tmp_path: Path, cache: Path
) -> None:
    content = (WEIGHTS / "augreg" / "model.npz").read_bytes()
    (tmp_path / "web" / "model.npz").write_bytes(content)
    Handler.cut.add("model.npz")
    with pytest.raises(Failure, match=f"^{web}/model.npz: cannot be downloaded"):
        read(f"{web}/model.npz")
    assert files_of(cache) == {}
    Handler.cut.clear()
    assert_same(f"{web}/model.npz", WEIGHTS / "augreg" / "model.npz")


def test_an_interrupted_transfer_keeps_the_file_of_before(
    web: str, tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "web" / "model.npz"
    file.write_bytes((WEIGHTS / "augreg" / "model.npz").read_bytes())
    read(f"{web}/model.npz")
    before = files_of(cache)
    file.write_bytes((WEIGHTS / "big_vision_map" / "model.npz").read_bytes())
    Handler.cut.add("model.npz")
    with pytest.raises(Failure, match="cannot be downloaded"):
        read(f"{web}/model.npz")
    assert files_of(cache) == before


def test_a_missing_a_forbidden_and_an_unreachable_file_are_named_in_one_line(
    web: str, tmp_path: Path
) -> None:
    (tmp_path / "web" / "secret.npz").write_bytes(b"x")
    Handler.refused.add("secret.npz")
    for url, kind, reason in (
        (f"{web}/gone.npz", UsageError, "no checkpoint there"),
        (f"{web}/gone", UsageError, "no checkpoint there"),
        (f"{web}/secret.npz", UsageError, "cannot be downloaded (403"),
        ("http://127.0.0.1:1/model.npz", Failure, "cannot be downloaded (Cannot connect"),
    ):
        with pytest.raises(kind) as caught:
            read(url)
        assert str(caught.value).startswith(f"{url}: {reason}"), caught.value
        assert "\n" not in str(caught.value) and caught.type is kind


@pytest.mark.parametrize("folder", MODELS, ids=lambda folder: folder.name)
def test_a_model_in_the_cache_is_used_with_one_line_when_the_server_is_gone(
    folder: Path, tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder, tmp_path / "web")
    with serving_folder(tmp_path / "web") as web:
        url = f"{web}/{MODELS[folder]}".rstrip("/")
        read(url)
    before = files_of(cache)
    capsys.readouterr()
    assert_same(url, folder / MODELS[folder])
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "cannot be" in x]
    assert line.startswith(url) and "cannot be downloaded (Cannot connect" in line
    assert line.endswith(f"; using the copy in {next(cache.iterdir())}")
    assert files_of(cache) == before


def test_a_model_in_the_cache_is_not_used_when_the_server_refuses_it(
    web: str, tmp_path: Path
) -> None:
    shutil.copytree(WEIGHTS / "augreg", tmp_path / "web", dirs_exist_ok=True)
    read(f"{web}/model.npz")
    Handler.refused.add("model.npz")
    with pytest.raises(UsageError, match="cannot be downloaded .403"):
        read(f"{web}/model.npz")


def test_files_of_two_versions_in_the_cache_are_not_used_when_the_server_is_gone(
    tmp_path: Path,
) -> None:
    """The download of a changed model ends after the first of its files."""
    shutil.copytree(WEIGHTS / "timm_vit", tmp_path / "web")
    with serving_folder(tmp_path / "web") as web:
        read(web)
        for name in ("model.safetensors", "config.json"):
            path = tmp_path / "web" / name
            path.write_bytes(path.read_bytes() + b" ")
        Handler.cut.add("config.json")
        with pytest.raises(Failure, match="config.json: cannot be downloaded"):
            read(web)
    with pytest.raises(Failure, match="model.safetensors: cannot be downloaded .Cannot connect"):
        read(web)


def test_a_data_file_that_the_index_names_and_the_server_lacks_is_named(memory: str) -> None:
    upload(PUBLISHED, memory)
    fsspec.filesystem("memory").rm(f"{memory}/ckpt.data-00001-of-00003")
    with pytest.raises(UsageError, match="^memory://models/ckpt.data-00001-of-00003: no such file"):
        read(f"{memory}/ckpt")


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://bucket/model", "s3:// is not supported, use gs, http, https, hf, memory"),
        ("https://host/model.npz?download=true", "give a URL without query"),
        ("https://", "give a URL without query"),
        ("memory://models/model.pth", "pickle files are not read"),
        ("memory://models/..", "no checkpoint there"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused_with_the_remedy(url: str, reason: str) -> None:
    with pytest.raises(UsageError) as caught:
        read(url)
    assert str(caught.value).startswith(f"{url}: {reason}")


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "remote"), ("https", "remote"), ("hf", "hf")])
def test_a_missing_package_is_named_with_the_extra_that_has_it(
    scheme: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = {"gs": "gcsfs", "https": "aiohttp", "hf": "huggingface_hub"}[scheme]
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails
    monkeypatch.delitem(_registry, scheme, raising=False)  # classes that are imported
    with pytest.raises(UsageError, match=rf"pip install 'vmoe\[{extra}\]'"):
        read(f"{scheme}://owner/name")


@pytest.mark.process
def test_a_run_starts_from_a_url_and_resumes(memory: str, tmp_path: Path) -> None:
    dense = dict(depth=1, sparse_blocks=())
    config = configs.replace(configs.load(TINY), model=dense, steps=2, optim=dict(warmup_steps=0))
    write(tmp_path / "model", stored_of(config.model))
    upload(tmp_path / "model", memory)
    for init in (memory, Path(memory)):
        train(config, tmp_path / "second", init=init)
    record = read_init(tmp_path / "second")
    assert record is not None and record["path"] == memory
    with pytest.raises(UsageError, match=f"began from {memory}, not from memory://other"):
        train(config, tmp_path / "second", init="memory://other")


def test_only_a_scheme_makes_a_url() -> None:
    assert url_of("gs:/bucket/a/") == url_of(Path("gs://bucket/a")) == "gs://bucket/a"
    assert url_of("hf://owner/name@v1") == "hf://owner/name@v1"
    for path in ("runs/digits", "/a/b", "c:/windows", "a:b", "./gs:/x", Path("x")):
        assert url_of(path) is None
