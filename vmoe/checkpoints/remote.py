"""Trained models at URLs: what a reader needs is downloaded into the user's cache.

A URL is that of a folder with ``model.safetensors`` and ``config.json``, of a .npz, .safetensors or
.index file, or the prefix of a published checkpoint: gs://BUCKET/PREFIX (read anonymously),
https://HOST/PATH, hf://OWNER/NAME[@REVISION], or memory://PATH of fsspec. A ``Path`` drops slashes,
so gs:/BUCKET/PREFIX means the same.

A file is downloaded again if the server reports another size, etag, generation, content or time
than for the file in the cache; fsspec says which of these a server reports. A change that none of
them shows, such as one of the same size within a second on a plain web server, is not noticed.

Models are pushed to hf:// only.

Tested with fsspec's memory file system, and with a web server and the interface of the hub on the
same machine; Google Cloud Storage and the Hugging Face hub were never reached.
"""

import hashlib
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

from vmoe.cache import atomic, cache_folder
from vmoe.checkpoints import chunked, safetensors_files
from vmoe.checkpoints.from_hugging_face import IMAGES
from vmoe.checkpoints.stored import StoredModel
from vmoe.checkpoints.vmoe_format import CONFIG, MODEL, write
from vmoe.errors import Failure, UsageError, VmoeError, one_line, shortened
from vmoe.signals import temporary_folder
from vmoe.workdir.layout import replace_text

EXTRAS = {"gs": "remote", "http": "remote", "https": "remote", "hf": "hf", "memory": "remote"}
"""Schemes of URLs, and the extra of this package that brings what reads them."""
IDENTITY = (  # what fsspec's file systems report about a file that differs after a change
    *("size", "etag", "ETag", "Last-Modified", "Content-MD5", "generation", "md5Hash"),
    *("blob_id", "created", "mtime"),
)
TIMEOUT = 60  # seconds without data after which a connection is given up
MAX_REASON = 200  # characters
PASSING = (408, 425, 429)  # HTTP statuses of a server that is late or busy
SINGLE = (".npz", ".safetensors", safetensors_files.INDEX)

Info = dict[str, Any]


def url_of(path: str | Path) -> str | None:
    """The URL that a path is, in its usual spelling; None if it is a path.

    >>> url_of(Path("gs://bucket/model")), url_of("runs/digits")
    ('gs://bucket/model', None)
    """
    found = re.fullmatch(r"([a-z][a-z0-9]+):/+(.*?)/*", str(path), re.DOTALL)
    return f"{found[1]}://{found[2]}" if found else None


def fetch(url: str) -> Path:
    """Downloads the files of a model that are not in the cache yet, each with a line on stderr.

    Returns:
        the path of the downloaded file, for ``opening.open_weights``.

    Raises:
        UsageError: there is no model at the URL, the server refuses it, or a package is missing.
        Failure: the server cannot be reached, the disk is full, or an index, which names further
            files, is corrupt.
    """
    server = _Server(url)
    for file in _candidates(url):
        if info := server.info(file):
            break
    else:
        raise UsageError(
            f"{url}: no checkpoint there; give a folder with {MODEL} and {CONFIG}, a .npz file, or "
            "the PREFIX of a published checkpoint, PREFIX.index"
        )
    path = server.download(file, info)
    if file.endswith(".index"):
        for data in chunked.data_files(path.with_suffix("")):
            server.download(_beside(file, data.name))
    elif not file.endswith(".npz"):
        for shard in safetensors_files.files(path)[1:]:
            server.download(_beside(file, shard.name))
        for name in (CONFIG, IMAGES):
            if more := server.info(_beside(file, name)):
                server.download(_beside(file, name), more)
            else:  # an earlier version of the model may have had one
                path.with_name(name).unlink(missing_ok=True)
    return path


def push(stored: StoredModel, url: str) -> None:
    """Writes a model as a folder of ours, and pushes it as one commit to the Hugging Face hub.

    Creates the repository if it does not exist, with the hub's default visibility, which is
    normally public: create it beforehand to keep it private. Earlier versions of the files stay in
    its history. The hub's client takes the token from HF_TOKEN, or from ``hf auth login``.

    Args:
        url: hf://OWNER/NAME.

    Raises:
        UsageError: the URL is not of this form, or a package is missing.
        Failure: the hub refuses the model or cannot be reached.
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


class _Server:
    """The file system of a URL."""

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
        """What the server says about a file; None if there is no such file."""
        try:
            info = self.system.info(url)
        except FileNotFoundError as error:  # that of a web server has the reason as its cause
            if _status(error.__cause__) in (404, 410) or self.scheme not in ("http", "https"):
                return None
            raise _unreadable(url, error.__cause__) from None
        except Exception as error:  # file systems raise errors of many types
            raise _unreadable(url, error) from None
        return info if info["type"] == "file" else None

    def download(self, url: str, info: Info | None = None) -> Path:
        """The file of a URL in the cache.

        Args:
            info: what the server says about it, if this is known.
        """
        info = info or self.info(url)
        if info is None:
            raise UsageError(f"{url}: no such file")
        identity = {key: str(info[key]) for key in IDENTITY if info.get(key) is not None}
        path = _cached(url)
        record = path.with_name(f"{path.name}.remote.json")
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
                record.unlink(missing_ok=True)
            replace_text(record, text)
        except Exception as error:  # file systems raise errors of many types
            raise _unreadable(url, error) from None
        return path


def _options(scheme: str) -> dict[str, Any]:
    """Settings of a file system: anonymous access, no limit on the time of a whole download."""
    if scheme == "gs":
        # gcsfs logs tracebacks of errors that it also raises
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
        return {"token": "anon"}
    if scheme in ("http", "https"):
        import aiohttp

        limits = aiohttp.ClientTimeout(total=None, sock_connect=TIMEOUT, sock_read=TIMEOUT)
        return {"client_kwargs": {"timeout": limits}}
    return {}


def _candidates(url: str) -> list[str]:
    """The files of which one is at the URL of a model."""
    if url.endswith((*SINGLE, ".index")):
        return [url]
    folder = [f"{url}/{MODEL}", f"{url}/{MODEL}{safetensors_files.INDEX}"]
    scheme, _, rest = url.partition("://")
    root = rest.count("/") < (2 if scheme == "hf" else 1)  # a host, bucket or repository
    return folder if root else [f"{url}.index", *folder]


def _beside(url: str, name: str) -> str:
    return f"{url.rpartition('/')[0]}/{name}"


def _cached(url: str) -> Path:
    """Where a file is kept: files of one folder stay together, under their names."""
    parent, _, name = url.rpartition("/")
    if not re.fullmatch(r"[\w.@+-]*\w", name):
        raise UsageError(f"{url}: {name!r} is not a valid name of a file in the cache")
    return cache_folder() / "checkpoints" / hashlib.sha256(parent.encode()).hexdigest()[:16] / name


def _package_missing(url: str, error: ImportError) -> UsageError:
    extra = EXTRAS[url.partition("://")[0]]
    return UsageError(
        f"{url}: a package is missing ({_reason(error)}); pip install 'vmoe[{extra}]'"
    )


def _unreadable(url: str, error: BaseException | None) -> VmoeError:
    """A UsageError if the address is wrong or the server refuses it; else a Failure."""
    wrong = isinstance(error, FileNotFoundError | ValueError) or 400 <= _status(error) < 500
    kind = UsageError if wrong and _status(error) not in PASSING else Failure
    return kind(f"{url}: cannot be downloaded ({_reason(error)})")


def _status(error: BaseException | None) -> int:
    """The HTTP status that an error of a client is about; 0 if it is about none."""
    status = getattr(getattr(error, "response", None), "status_code", None)  # the hub's client
    status = status or getattr(error, "status", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else 0


def _reason(error: BaseException | None) -> str:
    return shortened(one_line(" ".join(str(error).split()) or type(error).__name__), MAX_REASON)
