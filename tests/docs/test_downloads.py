"""Each command on the pages that downloads something does so from a server on this machine.

The server has the interfaces of Google Cloud Storage, of the Hugging Face hub and of a plain web
server, and files with exactly the names that the real hosts have. Their content is small and
random: the sizes of a model follow from its arrays, not from its name. The checksums of
Fashion-MNIST are replaced, because those of the real files are fixed.

The clients are pointed at the server by their own environment variables: STORAGE_EMULATOR_HOST,
HF_ENDPOINT, http_proxy. Without gcsfs, which is not in the lock file, a stand-in of a few lines
reads the same interface (``gcsfs_stand_in``).
"""

import gzip
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np
import pytest
from PIL import Image

from tests.data.test_tfds import build
from tests.docs.test_documentation import PAGES, ROOT, commands_of
from tests.random_models import stored_model
from tests.server import Answering, serving
from vmoe import zoo
from vmoe.checkpoints import write
from vmoe.checkpoints.remote import EXTRAS, url_of
from vmoe.data.sources import fashion_mnist

WEIGHTS = ROOT / "tests" / "golden" / "weights"
HUB = {  # golden weights that stand for a repository of the hub
    "timm/vit_small_patch16_224.augreg_in21k_ft_in1k": WEIGHTS / "timm_vit",
    "google/vit-base-patch16-224": WEIGHTS / "hf_vit",
}
DRIVER = """
import json, pathlib, sys
from vmoe.__main__ import main
from vmoe.data.sources import fashion_mnist

fashion_mnist.SHA256, fashion_mnist.DEBIAN = json.loads(sys.argv[1]), pathlib.Path("nothing")
for command in map(json.loads, sys.stdin):
    sys.argv = ["vmoe", *command]
    sys.stdout.flush()
    print(json.dumps({"command": command, "status": main()}), flush=True)
"""


def downloads(word: str) -> bool:
    """Whether a word of a command names something that is downloaded."""
    path = zoo.resolve(word) if re.fullmatch(r"[\w.]+", word) else word
    scheme, _, rest = (url_of(path) or "").partition("://")
    is_url = scheme in EXTRAS and not re.search(r"\b(OWNER|HOST|BUCKET)\b|\.\.\.", rest)
    return is_url or word == "fashion_mnist"


COMMANDS = {
    page: [command for command in commands_of(page) if any(map(downloads, command))]
    for page in PAGES
}


class Hosts(Answering):
    """All hosts in one; ``files`` are by host and path, ``read`` are those that were downloaded."""

    files: ClassVar[dict[str, bytes]] = {}
    read: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        if found := re.fullmatch(r"/(download/)?storage/v1/b/(\w+)/o(?:/(.*))?", path):
            media, bucket, name = found.groups()
            name = f"gs://{bucket}/{name}"
            if name not in self.files:
                self.answer({"items": []}, 200 if found[3] is None else 404)
            elif media or parse_qs(url.query).get("alt") == ["media"]:
                self.serve(name)
            else:
                self.answer({"name": found[3], "bucket": bucket, **self.described(name)})
        elif found := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/(.*))?", path):
            repository, call, _ = found.groups()
            every = [name for name in self.files if name.startswith(f"hf://{repository}/")]
            listed = [{"type": "file", "path": x.split("/", 4)[4], **self.size(x)} for x in every]
            body = listed if call == "tree" else {"id": repository, "sha": "1" * 40, "siblings": []}
            self.answer(body, 200 if every else 404)
        elif found := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/[^/]+/(.*)", path):
            self.serve(f"hf://{found[1]}/{found[2]}")
        else:
            self.serve(self.path)  # through a proxy it is the whole URL

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        found = re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/paths-info/.*", self.path)
        if not found:
            return self.answer({"error": self.path}, 404)
        asked = parse_qs(body).get("paths", []) or json.loads(body)["paths"]
        there = [path for path in asked if f"hf://{found[1]}/{path}" in self.files]
        answer = [
            {"type": "file", "path": path, **self.size(f"hf://{found[1]}/{path}")} for path in there
        ]
        self.answer(answer)

    def size(self, name: str) -> dict[str, Any]:
        content = self.files[name]
        return {"size": len(content), "oid": hashlib.sha1(content).hexdigest()}

    def described(self, name: str) -> dict[str, str]:
        time = "2022-01-01T00:00:00Z"
        size = str(len(self.files[name]))
        return {"size": size, "generation": "1", "updated": time, "timeCreated": time}

    def serve(self, name: str) -> None:
        if name in self.files and self.command == "GET":
            self.read.append(name)
        self.answer(self.files.get(name, b""), 200 if name in self.files else 404)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[str]:
    """The address of a server with all files that the pages download."""
    for entry in zoo.ENTRIES:
        if entry.path.startswith("gs://"):
            fields = dict(depth=2, sparse_blocks=(1,), num_classes=1000, moe=dict(num_experts=8))
            prefix = tmp_path / "published" / entry.path.rpartition("/")[2]
            write(stored_model("vmoe_test_last2_e4", **fields), prefix, format="published")
            for file in prefix.parent.iterdir():
                Hosts.files[f"{zoo.BUCKET}/{file.name}"] = file.read_bytes()
    for repository, folder in HUB.items():
        for file in folder.iterdir():
            Hosts.files[f"hf://{repository}/{file.name}"] = file.read_bytes()
    name = f"hf://{next(iter(HUB))}/config.json"
    Hosts.files[name] = Hosts.files[name].replace(b"vit_tiny_patch16_224", b"vit_small_patch16_224")
    rng = np.random.default_rng(0)
    for name in fashion_mnist.SHA256:
        pixels = bytes(16) + rng.integers(0, 255, (20, 28, 28), dtype=np.uint8).tobytes()
        content = pixels if "images" in name else bytes(8) + bytes(range(10)) * 2
        Hosts.files[f"{fashion_mnist.ADDRESS}/{name}.gz"] = gzip.compress(content)
    with serving(Hosts) as address:
        yield address


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """The folder of a reader: a photo, a folder of photos, and ImageNet."""
    from tensorflow_datasets import features

    folder = tmp_path / "reader"
    rng = np.random.default_rng(0)
    names = ["cat.jpg"]
    for split, kind, number in itertools.product(("train", "test"), ("cat", "dog"), range(28)):
        names.append(f"pets/{split}/{kind}/{number}.jpg")
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)).save(path)
    label = features.ClassLabel(num_classes=1000)
    build(folder / "tfds" / "imagenet2012" / "5.1.0", label, shards={"validation": (4,)})
    return folder


def names_of(words: list[str]) -> set[str]:
    """What a command downloads, as far as its words say so."""
    found = set()
    for word in filter(downloads, words):
        if word == "fashion_mnist":
            found |= {f"{fashion_mnist.ADDRESS}/{name}.gz" for name in fashion_mnist.SHA256}
            continue
        address = zoo.resolve(word)
        if address.startswith("hf://"):
            found |= {f"{address}/model.safetensors", f"{address}/config.json"}
        else:
            found |= {f"{address}.index", f"{address}.data-00000-of-00001"}
    return found


@pytest.mark.process
@pytest.mark.slow
def test_the_commands_of_the_pages_that_download_read_the_named_files(
    hosts: str, reader: Path, tmp_path: Path
) -> None:
    pytest.importorskip("huggingface_hub")
    commands = {tuple(command): command for of in COMMANDS.values() for command in of}
    environment = os.environ | {
        "STORAGE_EMULATOR_HOST": hosts,
        "HF_ENDPOINT": hosts,
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "http_proxy": hosts,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TFDS_DATA_DIR": str(reader / "tfds"),
        "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))),
    }
    if not importlib.util.find_spec("gcsfs"):
        shutil.copy(Path(__file__).with_name("gcsfs_stand_in.py"), tmp_path / "gcsfs.py")
        environment["PYTHONPATH"] += os.pathsep + str(tmp_path)
    sums = {
        name: hashlib.sha256(gzip.decompress(Hosts.files[f"{fashion_mnist.ADDRESS}/{name}.gz"]))
        for name in fashion_mnist.SHA256
    }
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps({k: v.hexdigest() for k, v in sums.items()})],
        input="".join(json.dumps(command) + "\n" for command in commands.values()),
        capture_output=True,
        text=True,
        cwd=reader,
        env=environment,
    )
    reports = [json.loads(x) for x in result.stdout.splitlines() if x.startswith('{"command"')]
    statuses = {tuple(report["command"]): report["status"] for report in reports}
    assert statuses == dict.fromkeys(commands, 0), result.stderr
    assert set().union(*map(names_of, commands.values())) <= set(Hosts.read)
    assert "cat.jpg" in result.stdout and (reader / "weights" / "s32" / "config.json").exists()


@pytest.mark.parametrize("page", [page for page in PAGES if COMMANDS[page]])
def test_a_page_with_a_command_that_downloads_says_what_was_not_tried(page: str) -> None:
    text = " ".join((ROOT / page).read_text().split())
    assert re.search(r"not tried with the real hosts?", text)


def test_the_pages_download_published_weights_timms_and_hugging_faces() -> None:
    every = [word for of in COMMANDS.values() for words in of for word in filter(downloads, words)]
    assert {"vmoe_s32_last2_e8.in1k_light", "fashion_mnist"} <= set(every)
    assert {word.removeprefix("hf://") for word in every if word.startswith("hf://")} == set(HUB)
