"""Models are pushed to the Hugging Face hub and read back, with the hub's own client.

The hub is a server on this machine that implements the requests of the client; it stores every file
in the commit itself, which the real hub does for small files only.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs

import pytest

from tests.command import forked
from tests.server import Answering, serving
from vmoe.checkpoints import read
from vmoe.trees import by_name

pytestmark = pytest.mark.process

WEIGHTS = Path(__file__).parents[1] / "golden" / "weights" / "timm_vit"
TOKEN = "hf_secret"
REPOSITORY = "someone/model"


class Hub(Answering):
    """Holds the files of one repository."""

    files: ClassVar[dict[str, bytes]] = {}
    commits: ClassVar[list[str]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        _, _, call = self.path.partition(f"/api/models/{REPOSITORY}/")
        if self.headers.get("Authorization") != f"Bearer {TOKEN}" and "paths-info" not in call:
            self.answer({"error": "Invalid username or password."}, 401)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{self.host}/{REPOSITORY}", "id": "1"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif call == "preupload/main":
            paths = [file["path"] for file in json.loads(body)["files"]]
            self.answer(
                {
                    "files": [
                        {"path": path, "uploadMode": "regular", "shouldIgnore": False}
                        for path in paths
                    ]
                }
            )
        elif call == "commit/main":
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                else:
                    self.commits.append(line["value"]["summary"])
            self.answer({"commitUrl": f"{self.host}/{REPOSITORY}/commit/1", "commitOid": "1"})
        elif call.startswith("paths-info/"):
            asked = parse_qs(body.decode()).get("paths", []) or json.loads(body)["paths"]
            self.answer([self.info(path) for path in asked if path in self.files])
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        call = self.path.partition("?")[0].removeprefix(f"/api/models/{REPOSITORY}")
        if call in ("", "/revision/main"):
            self.answer({"id": REPOSITORY, "sha": "1" * 40, "siblings": []})
        elif call.startswith("/tree/"):
            self.answer([self.info(path) for path in self.files])
        elif self.path.startswith(f"/{REPOSITORY}/resolve/"):
            name = self.path.rpartition("/")[2]
            self.answer(self.files.get(name, b""), 200 if name in self.files else 404)
        else:
            self.answer({"error": self.path}, 404)

    do_HEAD = do_GET

    @property
    def host(self) -> str:
        return f"http://{self.headers['Host']}"

    def info(self, path: str) -> dict[str, Any]:
        content = self.files[path]
        oid = hashlib.sha1(content).hexdigest()
        return {"type": "file", "path": path, "size": len(content), "oid": oid}


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    """The address of a hub."""
    pytest.importorskip("huggingface_hub")
    with serving(Hub) as address:
        yield address


def test_a_model_is_pushed_to_the_hub_and_read_back_bit_for_bit(hub: str, tmp_path: Path) -> None:
    env = {"HF_ENDPOINT": hub, "HF_HUB_DISABLE_TELEMETRY": "1", "XDG_CACHE_HOME": str(tmp_path)}
    url = f"hf://{REPOSITORY}"
    refused = forked("convert", WEIGHTS, url, environment=env | {"HF_TOKEN": "hf_wrong"})
    assert refused.returncode == 1
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"vmoe: {url}: cannot be pushed (")
    assert line.endswith("Invalid username or password.); set HF_TOKEN to one that may write there")
    assert not Hub.files

    pushed = forked("convert", WEIGHTS, url, environment=env | {"HF_TOKEN": TOKEN})
    assert pushed.returncode == 0, pushed.stderr
    assert pushed.stdout.startswith(f"{url}: ")
    assert sorted(Hub.files) == ["README.md", "config.json", "model.safetensors"]
    assert Hub.commits == ["Weights for vmoe"]

    back = forked("convert", url, tmp_path / "back", environment=env)
    assert back.returncode == 0, back.stderr
    expected, found = (by_name(read(path).params) for path in (WEIGHTS, tmp_path / "back"))
    assert {name: array.tobytes() for name, array in found.items()} == {
        name: array.tobytes() for name, array in expected.items()
    }
