"""Adds the files outside docs/ that its pages link to to the site, and rewrites these links.

A page links to a file by its path in the repository, such as ``../configs/digits.py``. On the site
that file is a page below ``repository/``: Markdown and images are unchanged, notebooks have their
outputs, and other text is a code block. Files that such a page links to are added as well.
"""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pygments.formatters import HtmlFormatter

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)\s#])")
IMAGES = (".png", ".svg", ".jpg")
LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".toml": "toml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the files outside docs/, and the style of the site."""
    code = HtmlFormatter(style="friendly").get_style_defs([".codehilite", ".highlight"])
    style = Path(__file__).with_name("style.css").read_text()
    files.append(File.generated(config, "style.css", content=f"{style}\n{code}"))
    left = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    while left:
        for path in _links_of(left.pop()):
            uri = _uri_of(path)
            if files.get_file_from_path(uri) is None and not path.startswith("docs/"):
                if uri.endswith(IMAGES):
                    added = File.generated(config, uri, abs_src_path=str(ROOT / path))
                else:
                    added = File.generated(config, uri, content=_as_page(path))
                    left.append(path)
                files.append(added)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrites the links of a page to files outside docs/ as links to their pages."""
    uri = page.file.src_uri
    here = posixpath.dirname(_path_of(uri))

    def turned(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, match[1]))
        target = _uri_of(path) if (ROOT / path).exists() else path
        return posixpath.relpath(target, posixpath.dirname(uri) or ".")

    return _outside_code(markdown, turned)


def _links_of(path: str) -> Iterator[str]:
    """The paths in the repository that a page links to."""
    if path.endswith(".md"):
        here, found = posixpath.dirname(path), list[str]()
        _outside_code((ROOT / path).read_text(), lambda match: found.append(match[1]) or "")
        paths = (posixpath.normpath(posixpath.join(here, link)) for link in found)
        yield from (path for path in paths if (ROOT / path).exists())


def _outside_code(markdown: str, turned: Callable[[re.Match[str]], str]) -> str:
    """Replaces the links of a page, except in code blocks."""
    parts = re.split(r"(^```.*?^```)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else LINK.sub(turned, part) for part in parts)


def _uri_of(path: str) -> str:
    """The page of the site for a path in the repository; for a folder its README."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    page = path if path.endswith((".md", *IMAGES)) else f"{path}.md"
    return f"repository/{page}"


def _path_of(uri: str) -> str:
    """The path in the repository of a page of the site."""
    inside = uri.removeprefix("repository/")
    return inside if inside != uri else f"docs/{uri}"


def _as_page(path: str) -> str:
    if (ROOT / path).is_dir():
        path = f"{path}/README.md"
    text = (ROOT / path).read_text()
    if path.endswith(".md"):
        return text
    if path.endswith(".ipynb"):
        cells = nbformat.reads(text, as_version=4).cells
        return "\n\n".join(part for cell in cells for part in _parts_of(cell))
    return f"# {path}\n\n```{LANGUAGES.get(Path(path).suffix, 'text')}\n{text}\n```\n"


def _parts_of(cell: nbformat.NotebookNode) -> Iterator[str]:
    """A cell of a notebook and its outputs, as Markdown."""
    yield f"```python\n{cell.source}\n```" if cell.cell_type == "code" else cell.source
    for output in cell.get("outputs", ()):
        data = output.get("data", {})
        if html := data.get("text/html"):
            yield f"<div>{html}</div>"
        elif picture := data.get("image/png"):
            yield f'<img src="data:image/png;base64,{picture.strip()}" alt="">'
        elif text := output.get("text") or data.get("text/plain"):
            yield f"```text\n{text.rstrip()}\n```"
