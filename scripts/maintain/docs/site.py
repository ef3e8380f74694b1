"""Builds the site of docs/ in a folder; fails if a link or a reference is broken.

python -m scripts.maintain.docs.site .cache/site

Zensical builds it from copies of the pages. A page of docs/ links to a file outside docs/ by its
path in the repository, such as ``../configs/digits.py``. On the site that file is a page below
``repository/``: Markdown and images are unchanged, notebooks have their outputs, and other text is
a code block. Files that such a page links to are added as well.
"""

import json
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)\s#])")
IMAGES = (".png", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml"}
SHELL = re.compile(
    r"^```\n(?=(?:\w+=\S+ )*(?:\./scripts/|(?:export|pip|python3?|source|vmoe) ))", re.MULTILINE
)
"""The start of a code block without a language that begins with a command."""


def build(site: Path) -> None:
    """Builds the site in a folder, in place of what is there."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        lay_out(made / "pages")
        for name in ("style.css", "iframe-worker.js"):
            shutil.copy(HERE / name, made / "pages")
        config = (HERE / "zensical.toml").read_text().replace("ROOT", str(ROOT))
        (made / "zensical.toml").write_text(config)
        command = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file"]
        result = subprocess.run(
            [*command, made / "zensical.toml"], capture_output=True, text=True, cwd=ROOT
        )
        if result.returncode:
            said = re.sub(r"\x1b\[[\d;]*m", "", result.stdout + result.stderr)  # its colors
            sys.exit(f"the site was not built\n{said.partition('Traceback')[0]}")
        shutil.rmtree(site, ignore_errors=True)
        shutil.move(made / "site", site)


def lay_out(folder: Path) -> None:
    """Copies the pages of docs/, and all files that they link to, with the links of the site."""
    left = [path for path in (ROOT / "docs").rglob("*") if path.is_file()]
    left, seen = [str(path.relative_to(ROOT)) for path in left], set[str]()
    while left:
        path = left.pop()
        uri = _uri_of(path)
        if uri in seen:
            continue
        seen.add(uri)
        target = folder / uri
        target.parent.mkdir(parents=True, exist_ok=True)
        if uri.endswith(".md"):
            here = posixpath.dirname(f"{path}/" if (ROOT / path).is_dir() else path)
            text = _as_page(path)
            left += _links_of(text, here)
            text = _relinked(text, here, posixpath.dirname(uri))
            target.write_text(SHELL.sub("```bash\n", text))
        else:
            shutil.copy(ROOT / path, target)


def _links_of(markdown: str, here: str) -> Iterator[str]:
    """The paths in the repository that a page links to."""
    found = list[str]()
    _outside_code(markdown, lambda match: found.append(match[1]) or "")
    paths = (posixpath.normpath(posixpath.join(here, link)) for link in found)
    yield from (path for path in paths if (ROOT / path).exists())


def _relinked(markdown: str, here: str, there: str) -> str:
    """A page of the folder `here` of the repository with the links that it has on the site."""

    def turned(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, match[1]))
        target = _uri_of(path) if (ROOT / path).exists() else path
        return posixpath.relpath(target, there or ".")

    return _outside_code(markdown, turned)


def _outside_code(markdown: str, turned: Callable[[re.Match[str]], str]) -> str:
    """Replaces the links of a page, except in code blocks."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(turned, part) for part in parts)


def _uri_of(path: str) -> str:
    """The page of the site for a path in the repository; for a folder its README."""
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    page = path if path.endswith((".md", *IMAGES)) else f"{path}.md"
    return f"repository/{page}"


def _as_page(path: str) -> str:
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        cells = json.loads(text)["cells"]
        return "\n\n".join(part for cell in cells for part in _parts_of(cell))
    return f"# {path}\n\n```{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n```\n"


def _parts_of(cell: dict[str, Any]) -> Iterator[str]:
    """A cell of a notebook and its outputs, as Markdown."""
    source = "".join(cell["source"])  # a text in a notebook is a string or a list of lines
    yield f"```python\n{source}\n```" if cell["cell_type"] == "code" else source
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if html := data.get("text/html"):
            yield f"<div>{''.join(html)}</div>"
        elif picture := data.get("image/png"):
            yield f'<img src="data:image/png;base64,{"".join(picture).strip()}" alt="">'
        elif text := output.get("text") or data.get("text/plain"):
            yield f"```text\n{''.join(text).rstrip()}\n```"


if __name__ == "__main__":
    build(Path(sys.argv[1]))
