"""Trained models at URLs, which are downloaded into the user's cache.

A URL names a folder with ``model.safetensors`` and ``config.json``, a .npz, .safetensors or .index
file, or the prefix of a published checkpoint: gs://BUCKET/PREFIX (read anonymously),
https://HOST/PATH, hf://OWNER/NAME[@REVISION], or memory://PATH of fsspec. A ``Path`` drops slashes,
so gs:/BUCKET/PREFIX means the same.

Each use asks the server whether the files have changed. A file is downloaded again if its size,
etag, generation, content or time differs from the recorded one. fsspec decides which of these a
server reports. A change that shows in none of them is missed, for example one of the same size
within a second on a plain web server. If the server cannot be reached, the model in the cache is
used, provided that all its files are there.

Models can be pushed to hf:// only.

The tests use fsspec's memory file system, and servers on the same machine with the interfaces of a
web server, Google Cloud Storage and the Hugging Face hub. The real hosts were never reached.
"""

import hashlib
import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import Any

from vmoe.checkpoints import chunked, safetensors_files
from vmoe.checkpoints.from_hugging_face import IMAGES
from vmoe.checkpoints.stored import StoredModel
from vmoe.checkpoints.vmoe_format import CONFIG, MODEL, write
from vmoe.errors import Failure, UsageError, VmoeError, one_line, parse_json, shortened
from vmoe.host.cache import atomic, cache_folder
from vmoe.host.signals import temporary_folder
from vmoe.workdir.layout import replace_text

EXTRAS = {"gs": "remote", "http": "remote", "https": "remote", "hf": "hf", "memory": "remote"}
"""The schemes of URLs, and the extra of this package that installs the client for each."""
IDENTITY = (  # keys in fsspec's description of a file whose values differ after a change
    *("size", "etag", "ETag", "Last-Modified", "Content-MD5", "generation", "md5Hash"),
    *("blob_id", "created", "mtime"),
)
TIMEOUT = 60  # seconds without data after which a connection is given up
MAX_REASON = 200  # characters
PASSING = (408, 425, 429)  # HTTP statuses of a server that is late or busy
RECORD = ".remote.json"  # suffix of the records beside the cached files
SINGLE = (".npz", ".safetensors", safetensors_files.INDEX)

Info = dict[str, Any]


def url_of(path: str | Path) -> str | None:
    """A URL in its usual spelling; None if the argument is a path.

    >>> url_of(Path("gs://bucket/model")), url_of("runs/digits")
    ('gs://bucket/model', None)
    """
    found = re.fullmatch(r"([a-z][a-z0-9]+):/+(.*?)/*", str(path), re.DOTALL)
    return f"{found[1]}://{found[2]}" if found else None


def fetch(url: str) -> Path:
    """Downloads the files of a model that are not in the cache yet, each with a line on stderr.

    If the server cannot be reached, the model in the cache is used, with a line on stderr.

    Returns:
        the path of the downloaded file, for ``opening.open_weights``.

    Raises:
        UsageError: there is no model at the URL, the server refuses it, or a package is missing.
        Failure: the server cannot be reached and the cache lacks a file; the disk is full; or an
            index, which names further files, is corrupt.
    """
    try:
        paths = _fetch(url)
    except _Unreachable as failure:
        for path in map(_cached, _candidates(url)):
            if _is_whole(path):
                print(f"{failure}; using the copy in {path.parent}", file=sys.stderr)
                return path
        raise Failure(str(failure)) from None
    if not _is_whole(paths[0]):
        try:
            replace_text(_whole(paths[0]), json.dumps([path.name for path in paths]))
        except OSError as error:
            raise _unreadable(url, error) from None
    return paths[0]


def _fetch(url: str) -> list[Path]:
    """The files of a model, which are downloaded if they are not in the cache."""
    server = _Server(url)
    for file in _candidates(url):
        if info := server.info(file):
            break
    else:
        raise UsageError(
            f"{url}: no checkpoint there; give a folder with {MODEL} and {CONFIG}, a .npz "
            "file, or the PREFIX of a published checkpoint, PREFIX.index"
        )
    server.whole = _whole(_cached(file))
    path = server.download(file, info)
    paths = [path]
    if file.endswith(".index"):
        for data in chunked.data_files(path.with_suffix("")):
            paths.append(server.download(_beside(file, data.name)))
    elif not file.endswith(".npz"):
        for shard in safetensors_files.files(path)[1:]:
            paths.append(server.download(_beside(file, shard.name)))
        for name in (CONFIG, IMAGES):
            if more := server.info(_beside(file, name)):
                paths.append(server.download(_beside(file, name), more))
            else:  # an earlier version of the model may have had one
                path.with_name(name).unlink(missing_ok=True)
    return paths


def _whole(path: Path) -> Path:
    """A file beside a cached model: the names of its files, when all are from one version."""
    return path.with_name(f"{path.name}.whole{RECORD}")


def _is_whole(path: Path) -> bool:
    """Whether all files of a model are in the cache, from one version of the model."""
    try:
        names = parse_json(_whole(path).read_bytes())
    except (OSError, ValueError):
        return False
    return all(path.with_name(name).is_file() for name in names)


def push(stored: StoredModel, url: str) -> None:
    """Writes a model as a folder in vmoe's format, and pushes it to the hub as one commit.

    Creates the repository if it does not exist, with the hub's default visibility, which is
    normally public: create it beforehand to keep it private. Earlier versions of the files stay in
    its history. The hub's client takes the token from HF_TOKEN, or from ``hf auth login``.

    Args:
        url: hf://OWNER/NAME.
    """
    if not (found := re.fullmatch(r"hf://([\w.-]+/[\w.-]+)", url)):
        raise UsageError(f"{url}: models can be pushed to hf://OWNER/NAME only")
    try:
        import huggingface_hub
    except ImportError as error:
        raise _package_missing(url, error) from None
    with temporary_folder() as parent:
        folder = parent / found[1].partition("/")[2]
        write(folder, stored)
        try:
            hub = huggingface_hub.HfApi()
            hub.create_repo(found[1], exist_ok=True)
            hub.upload_folder(
                repo_id=found[1], folder_path=folder, commit_message="Weights for vmoe"
            )
        except Exception as error:  # the client raises errors of many types
            denied = _status(error) in (401, 403)
            remedy = "; set HF_TOKEN to one that may write there" if denied else ""
            raise Failure(f"{url}: cannot be pushed ({_reason(error)}){remedy}") from None


class _Unreachable(Failure):
    """The server does not answer, or answers that it is out of order."""


class _Server:
    """The file system of a URL; ``whole`` is removed when a download changes the cached model."""

    whole: Path

    def __init__(self, url: str) -> None:
        scheme, _, rest = url.partition("://")
        if scheme not in EXTRAS:
            raise UsageError(f"{url}: {scheme}:// is not supported, use {', '.join(EXTRAS)}")
        if re.search(r"[?#\s]", rest) or not rest:
            raise UsageError(f"{url}: give a URL without query, fragment and spaces")
        self.scheme = scheme
        try:
            import fsspec

            self.system = fsspec.filesystem(scheme, **_options(scheme))
        except ImportError as error:
            raise _package_missing(url, error) from None
        except Exception as error:  # file systems raise errors of many types
            raise UsageError(f"{url}: {_reason(error)}") from None
        self.system.invalidate_cache()

    def info(self, url: str) -> Info | None:
        """The server's description of a file; None if there is no such file.

        Raises:
            UsageError: the server refuses the file.
            _Unreachable: the server does not answer.
        """
        try:
            info = self.system.info(url)
        except FileNotFoundError as error:  # from a web server, it has the reason as its cause
            if _status(error.__cause__) in (404, 410) or self.scheme not in ("http", "https"):
                return None
            raise _unreadable(url, error.__cause__, _Unreachable) from None
        except Exception as error:  # file systems raise errors of many types
            raise _unreadable(url, error, _Unreachable) from None
        return info if info["type"] == "file" else None

    def download(self, url: str, info: Info | None = None) -> Path:
        """Downloads a file into the cache unless it is there; returns its path."""
        info = info or self.info(url)
        if info is None:
            raise UsageError(f"{url}: no such file")
        identity = {key: str(info[key]) for key in IDENTITY if info.get(key) is not None}
        path = _cached(url)
        record = path.with_name(path.name + RECORD)
        text = json.dumps({"url": url} | identity)
        if path.is_file() and record.is_file() and record.read_bytes() == text.encode():
            return path
        size = info.get("size")
        amount = "of unknown size" if size is None else f"{size:,} bytes"
        print(f"downloading {path.name} from {url}, {amount}, to {path.parent}", file=sys.stderr)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as partial:
                self.system.get_file(url, str(partial))
                if size is not None and (found := partial.stat().st_size) != size:
                    raise OSError(f"{found:,} of {size:,} bytes were received")
                for outdated in (record, self.whole):
                    outdated.unlink(missing_ok=True)
            replace_text(record, text)
        except Exception as error:  # file systems raise errors of many types
            raise _unreadable(url, error) from None
        return path


def _options(scheme: str) -> dict[str, Any]:
    """Settings of a file system: anonymous access, no limit on the time of a whole download."""
    if scheme == "gs":
        # otherwise gcsfs also looks up the type of the bucket by gRPC, for a minute if that fails
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        # gcsfs logs tracebacks of errors that it also raises
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        return {"token": "anon"}
    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        return {"client_kwargs": {"timeout": limits}}
    return {}


def _candidates(url: str) -> list[str]:
    """The URLs at which the first file of a model may be; one of them exists."""
    if url.endswith((*SINGLE, ".index")):
        return [url]
    folder = [f"{url}/{MODEL}", f"{url}/{MODEL}{safetensors_files.INDEX}"]
    scheme, _, rest = url.partition("://")
    root = rest.count("/") < (2 if scheme == "hf" else 1)  # a host, bucket or repository
    return folder if root else [f"{url}.index", *folder]


def _beside(url: str, name: str) -> str:
    return f"{url.rpartition('/')[0]}/{name}"


def _cached(url: str) -> Path:
    """The path of a file in the cache. Files of one folder stay together, under their names."""
    parent, _, name = url.rpartition("/")
    if not re.fullmatch(r"[\w.@+-]*\w", name):
        raise UsageError(f"{url}: {name!r} is not a valid name of a file in the cache")
    return cache_folder() / "checkpoints" / hashlib.sha256(parent.encode()).hexdigest()[:16] / name


def _package_missing(url: str, error: ImportError) -> UsageError:
    extra = EXTRAS[url.partition("://")[0]]
    return UsageError(
        f"{url}: a package is missing ({_reason(error)}); pip install 'vmoe[{extra}]'"
    )


def _unreadable(
    url: str, error: BaseException | None, otherwise: type[Failure] = Failure
) -> VmoeError:
    """A UsageError if the address is wrong or the server refuses it."""
    wrong = isinstance(error, FileNotFoundError | ValueError) or 400 <= _status(error) < 500
    kind = UsageError if wrong and _status(error) not in PASSING else otherwise
    return kind(f"{url}: cannot be downloaded ({_reason(error)})")


def _status(error: BaseException | None) -> int:
    """The HTTP status in an error of a client; 0 if there is none."""
    status = getattr(getattr(error, "response", None), "status_code", None)  # the hub's client
    status = status or getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else 0


def _reason(error: BaseException | None) -> str:
    return shortened(one_line(" ".join(str(error).split()) or type(error).__name__), MAX_REASON)
