"""A stand-in for gcsfs where it is not installed; reads the JSON interface of the same server."""

import json
import os
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import quote

from fsspec import AbstractFileSystem


class GCSFileSystem(AbstractFileSystem):
    """Reads objects at $STORAGE_EMULATOR_HOST."""

    protocol = ("gs", "gcs")

    def __init__(self, *, token: str) -> None:
        assert token == "anon", "the published checkpoints are read without an account"
        super().__init__(token=token)

    def _get(self, path: str, query: str = "") -> bytes:
        bucket, _, name = self._strip_protocol(path).partition("/")
        host = os.environ["STORAGE_EMULATOR_HOST"]
        address = f"{host}/storage/v1/b/{bucket}/o/{quote(name, safe='')}{query}"
        try:
            with urllib.request.urlopen(address) as response:
                return response.read()
        except urllib.error.HTTPError as error:
            raise FileNotFoundError(path) from error

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        found = json.loads(self._get(path))
        return found | {"size": int(found["size"]), "type": "file"}

    def get_file(self, rpath: str, lpath: str, **_: Any) -> None:
        with open(lpath, "wb") as file:
            file.write(self._get(rpath, "?alt=media"))
