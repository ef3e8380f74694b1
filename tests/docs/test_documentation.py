"""The Python of the pages runs as written, some of them for fewer steps, and the options of their
commands exist."""

import ast
import importlib
import inspect
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import vmoe
import vmoe.axes
import vmoe.classic
import vmoe.config
import vmoe.multitask
from scripts.experiments.__main__ import EXPERIMENTS
from tests.browser import in_a_browser, started, wait
from tests.routers import ROUTERS
from vmoe.checkpoints import chunked, vmoe_format
from vmoe.checkpoints.export import onnx_file
from vmoe.checkpoints.restore import FORMAT as CHECKPOINT_FORMAT
from vmoe.cli.main import COMMANDS, module_of
from vmoe.config import files as config_files
from vmoe.data.sources import index
from vmoe.workdir.routing_file import FORMAT as ROUTING_FORMAT

ROOT = Path(__file__).parents[2]
PAGES = (
    *("README.md", "CONTRIBUTING.md", "SECURITY.md", "configs/README.md", "scripts/README.md"),
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
)


# a file that docs/extending.md has the reader write
EXAMPLE = "vmoe/routing/threshold.py"


SHELL = (".sh", ".yaml")


FEWER_STEPS = {
    "docs/training_loop.md": {"STEPS, BATCH, DECAY = 300,": "STEPS, BATCH, DECAY = 40,"},
    "docs/layer.md": {
        "STEPS, BATCH = 100,": "STEPS, BATCH = 4,",
        "WIDTH, DEPTH, EXPERTS = 32, 12, 8": "WIDTH, DEPTH, EXPERTS = 32, 2, 2",
    },
    "docs/mixtures.md": {
        "n_refits=50": "n_refits=2",
        "range(1, 6)": "range(1, 5)",
        "tol=1e-9": "tol=1e-6",
    },
    "docs/multitask.md": {"in range(5)": "in range(1)", '"max_epochs": 30': '"max_epochs": 2'},
    "docs/family.md": {"n_refits=50": "n_refits=5"},
}
"""What a page sets and what the test sets, where running is most of the time."""


def python_of(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


WITH_PYTHON = [page for page in PAGES if "```python" in (ROOT / page).read_text()]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in WITH_PYTHON if page != "docs/from_timm.md"])
def test_the_python_of_a_page_runs(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")  # some pages load one of them
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = python_of(page)
    for written, fewer in FEWER_STEPS.get(page, {}).items():
        assert any(written in block for block in blocks)
        blocks = [block.replace(written, fewer) for block in blocks]
    for number, block in enumerate(blocks):
        if "write_onnx" in block and find_spec("jax2onnx") is None:
            continue  # which the lock does not have
        exec(compile(block, f"{page}, block {number}", "exec"), names)
    if page == "README.md":
        assert names["loaded"].class_names[names["logits"][0].argmax()] == "Ankle boot"
        assert names["model"].config.num_classes == 10


@pytest.mark.slow
def test_the_code_next_to_timms_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = python_of("docs/from_timm.md")
    words = ("vmoe", "loaded", "# new", "sparse")
    ours = [block for block in blocks if any(word in block for word in words)]
    assert len(ours) == 6
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"DIR": ROOT / "tests" / "golden" / "weights" / "timm_vit"}
    exec("\n".join(ours), names)
    assert names["grid"].shape == (1, 4, 4, 24) and len(names["records"]) == 1
    assert names["model"](names["images"]).shape == (1, 5)
    assert np.isfinite(names["value"])
    (record,) = names["records"].values()
    assert record.aux_loss > 0  # of the losses that the loop adds


def commands_of(page: str) -> list[list[str]]:
    """The words of each vmoe command in the code blocks of a page, without the shell's syntax."""
    fences = r"^```(\w*)\n(.*?)^```"
    blocks = re.findall(fences, (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = "\n".join(text for name, text in blocks if not name).replace("\\\n", " ").splitlines()
    pattern = re.compile(r"(?:\$ )?(?:\w+=\S+ )*vmoe (.*?)(?: [>&|].*)?")
    matches = filter(None, map(pattern.fullmatch, lines))
    return [shlex.split(match[1], comments=True) for match in matches]


@pytest.mark.parametrize("page", [page for page in PAGES if "commands.md" not in page])
def test_the_commands_of_a_page_are_accepted_by_their_parsers(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    for command, *words in commands_of(page):
        if command in ("--help", "--version", "summary"):
            continue  # they have no parser, or one that depends on the model
        assert command in COMMANDS, (command, words)
        module = module_of(command)
        if "--config" in words:  # a reader's own config becomes one that is here
            given = words.index("--config") + 1
            if not (ROOT / words[given]).is_file() and re.search(r"[./]|^[A-Z]+$", words[given]):
                words[given] = "digits"
        if "--dry-run" in words:  # needs no run folder
            words += ["--workdir", "runs/any"]
        parse = getattr(module, "parse_with_config", None) or module.parse
        parse(getattr(module, f"{command.title()}Args"), command, words)


@pytest.mark.process
def test_the_options_of_the_commands_on_the_pages_exist() -> None:
    used = dict[str, set[str]]()
    for text in ((ROOT / page).read_text() for page in PAGES):
        lines = re.findall(
            r"^(?:\$ )?vmoe ([a-z]+ [^#\n]*)|`vmoe ([a-z]+[^`]*)`", text, re.MULTILINE
        )
        for line in map("".join, lines):
            options = re.findall(r"(?<!\S)--[\w.-]+", line)
            used.setdefault(line.split()[0], set()).update({*options} - {"--help"})
    reference = (ROOT / "docs" / "reference" / "commands.md").read_text()
    made = subprocess.run(
        [sys.executable, "-m", "scripts.maintain.docs.reference"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert made.stdout == reference, f"run ./scripts/docs.sh {made.stderr}"
    of_config = reference.partition("## Options of a config")[2]
    for name, options in used.items():
        shown = reference.partition(f"## vmoe {name}\n")[2].partition("\n## ")[0]
        shown += of_config * ("#options-of-a-config" in shown)
        assert options <= {*re.findall(r"--[\w.-]+\w", shown)}, name


def test_the_scripts_on_the_pages_exist_and_define_the_options() -> None:
    framework = (ROOT / "scripts" / "experiments" / "framework").glob("*.py")
    shared = "".join(path.read_text() for path in framework)
    for page in PAGES:
        text = (ROOT / page).read_text().replace("\\\n", " ")
        assert not re.search(r"python3?\s+scripts/", text), page  # they are run as modules
        for name, words in re.findall(r"python -m scripts\.([a-z_.]+\w)([^\n`|#]*)", text):
            if name == "experiments":
                command, _, words = words.strip().partition(" ")
                if command == "NAME":
                    continue
                name = f"experiments.{EXPERIMENTS[command]}"
            script = Path(find_spec(f"scripts.{name}").origin)
            if script.name == "__init__.py":
                script = script.with_name("__main__.py")
            defined = script.read_text() + shared * name.startswith("experiments.")
            for option in re.findall(r"(?<!\S)--[\w-]+", words):
                assert f'"{option}"' in defined, (page, name, option)


def test_every_option_and_every_section_of_options_has_a_text() -> None:
    reference = (ROOT / "docs" / "reference" / "commands.md").read_text()
    options = re.findall(r"^\| `(-.*?)` \|.*(?<!\\)\| (.*?) \|$", reference, re.MULTILINE)
    assert len(options) > 200
    short = [option for option, text in options if len(text.split()) < 2]
    assert not short and not re.search(r"^\*\*.*\*\*$", reference, re.MULTILINE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("built") / "site"
    command = [sys.executable, "-m", "scripts.maintain.docs.site", folder]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr  # no link and no reference is broken
    return folder


@pytest.mark.process
@pytest.mark.slow
def test_the_site_loads_nothing_from_elsewhere_and_colors_shell_commands(site: Path) -> None:
    texts = "".join(path.read_text() for path in site.rglob("*.html"))
    loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*? src=[\"']?([^\"'> ]+)", texts)
    loaded += re.findall(r"<link[^>]*? href=[\"']?([^\"'> ]+)", texts)
    for sheet in site.rglob("*.css"):
        loaded += re.findall(r"@import [^;]*|url\([^)]*", sheet.read_text())
    elsewhere = re.compile(r"(?:@import |url\()?[\"']?(?:https?:)?//")
    assert loaded and not list(filter(elsewhere.match, loaded))
    install = (site / "install.html").read_text()
    assert re.search(r'language-bash[^>]*><pre>.*<span class="nb">source</span>', install)


@pytest.mark.process
@pytest.mark.slow
@in_a_browser
def test_the_search_of_the_site_needs_no_server(site: Path) -> None:
    with started() as browser:
        browser.get((site / "install.html").as_uri())
        browser.execute_script("document.querySelector('.md-search__button').click()")
        shown = "return document.activeElement.shadowRoot?.querySelector"
        wait(browser, f"{shown}('input')")
        browser.switch_to.active_element.send_keys("capacity")
        assert wait(browser, f"{shown}('a[href]')?.href").startswith(site.as_uri())


def test_the_site_and_the_first_page_list_every_page() -> None:
    config = tomllib.loads((ROOT / "scripts" / "maintain" / "docs" / "zensical.toml").read_text())
    listed = pages_of(config["project"]["nav"])
    pages = [str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(listed) == sorted(pages)
    first = (ROOT / "docs" / "README.md").read_text()
    results = (ROOT / "docs" / "results" / "README.md").read_text()
    for page in {*pages} - {"README.md"}:
        name = page.removeprefix("results/")
        assert f"]({page}" in first or (name != page and f"]({name}" in results), page


def test_the_first_pages_say_what_one_gets_before_the_status() -> None:
    routers = [
        name
        for name in vmoe.config.__all__
        if isinstance(kind := getattr(vmoe.config, name), type)
        and issubclass(kind, vmoe.config.AnyRouter)
        and kind not in (vmoe.config.AnyRouter, vmoe.Router)
    ]
    for page in ("README.md", "docs/README.md"):
        lines = (ROOT / page).read_text().splitlines()
        first, status, _ = "\n".join(lines[:25]).partition("Status, ")
        assert status
        what = ("which patch", "fewer slots", "bitwise equal", "devices", f" {len(routers)} ")
        assert [words for words in what if words not in first] == [], page


def pages_of(nav: Any) -> list[str]:
    """The pages in the navigation of the site."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_of(part)]


def test_the_citation_agrees_with_the_package_and_names_no_person_as_its_author() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name: citation[name] for name in ("version", "license")} == {
        name: project[name] for name in ("version", "license")
    }
    assert citation["authors"] == [{"name": "the vmoe authors"}]
    assert citation["references"][0]["title"] in (ROOT / "README.md").read_text()


def test_the_page_of_compatibility_has_the_versions_of_the_code() -> None:
    page = (ROOT / "docs" / "compatibility.md").read_text()
    rows = [re.findall(r"(?<=\| ).*?(?= \|)", line) for line in page.splitlines()]
    cells = {row[0]: row[1:3] for row in rows if len(row) == 4}
    for file, version in {
        "`config.json` of a run": config_files.FORMAT,
        "a checkpoint of a run, `checkpoints/STEP`": CHECKPOINT_FORMAT,
        "`routing.json` of `vmoe capacity`": ROUTING_FORMAT,
        "a folder of `vmoe convert` or `Loaded.save`": vmoe_format.VERSION,
        "published V-MoE checkpoints": chunked.VERSION,
    }.items():
        assert re.search(rf"` {version}\b", cells[file][0]), file
    assert cells["indexes of data sets, in the [cache](environment.md)"][1] == str(index.VERSION)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (jax,) = (each for each in project["dependencies"] if each.startswith("jax>"))
    assert jax == "jax>=0.10.1,!=0.10.2,!=0.11.0" and "0.10.1 and later, except 0.10.2 and" in page
    assert project["requires-python"] == ">=3.11,<3.15" and "| Python | 3.11 to 3.14;" in page
    assert f"opset {onnx_file.OPSET}." in page


def entries_of_the_map() -> dict[str, str]:
    """The text in CONTRIBUTING.md about each file and folder of vmoe."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    lines = text.partition("## How the code is laid out\n```\nvmoe/")[2].partition("```")[0]
    entries = re.split(r"^ {7}(?=\S)", f"     {lines}", flags=re.MULTILINE)[1:]
    cells = (re.split(" {2,}", entry, maxsplit=1) for entry in entries)
    return {name: text for names, text in cells for name in names.split(", ")}


def names_in(text: str) -> set[str]:
    """The names in an entry of the map, each alone between two spaces or punctuation.

    Parentheses hold comments. A title ends with a colon; with "/:" it is the name of a folder.
    """
    text = re.sub(r" \([^)]*\)", "", text)
    titled = re.sub(r"/:", "/  ", text)
    untitled = re.sub(r"(?:(?!  )[^,;\n])*:", "", titled)
    parts = (part.strip() for part in re.split(r"[,;\n]|  +", untitled))
    found = (re.fullmatch(r"(\w+/?)", part) for part in parts)
    return {match[1] for match in found if match}


def test_each_entry_of_a_docstring_is_one_parameter_of_its_function() -> None:
    """The API reference shows an entry beside the annotation of the parameter of its name."""
    entry = re.compile(r"^ {4}(\S[^:(]*):(?: |$)", re.MULTILINE)
    for path in (ROOT / "vmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                continue
            section = "Args" if isinstance(node, ast.FunctionDef) else "Attributes"
            _, found, text = (ast.get_docstring(node) or "").partition(f"\n{section}:\n")
            names = entry.findall(text.split("\n\n")[0]) if found else []
            known = names
            if isinstance(node, ast.FunctionDef):
                arguments = node.args
                every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
                known = [x.arg for x in (*every, arguments.vararg, arguments.kwarg) if x]
            for name in names:
                assert name.isidentifier() and name in known, f"{path}: {node.name}: {name}"


def test_the_map_of_the_code_has_every_module_and_nothing_else() -> None:
    entries = entries_of_the_map()
    hidden = {"__init__.py", "__main__.py"}
    packages = {f"{path.parent.name}/" for path in (ROOT / "vmoe").glob("*/__init__.py")}
    assert (
        entries.keys() == packages | {path.name for path in (ROOT / "vmoe").glob("*.py")} - hidden
    )
    for package in packages:
        folder = ROOT / "vmoe" / package
        below = {f"{path.parent.name}/" for path in folder.glob("*/**/__init__.py")}
        modules = {path.stem for path in folder.rglob("*.py") if path.name not in hidden}
        assert names_in(entries[package]) == modules | below, package


def test_no_line_of_a_page_is_wider_than_100_columns_but_tables() -> None:
    for page in PAGES:
        lines = enumerate((ROOT / page).read_text().splitlines(), start=1)
        wide = [n for n, line in lines if len(line) > 100 and not line.startswith(("|", "!["))]
        assert not wide, (page, wide)


def imported() -> dict[str, Any]:
    """The names that the Python of the pages imports from vmoe."""
    found: dict[str, Any] = {}
    for block in (block for page in WITH_PYTHON for block in python_of(page)):
        for line in ast.walk(ast.parse(block)):
            if isinstance(line, ast.ImportFrom) and line.module and line.module.startswith("vmoe"):
                module = importlib.import_module(line.module)
                found |= {f"{line.module}.{x.name}": getattr(module, x.name) for x in line.names}
    return found


def path_of(public: Any) -> str:
    """Where a name is defined."""
    if inspect.ismodule(public):
        return public.__name__
    return f"{public.__module__}.{public.__qualname__}"


def test_the_page_of_the_api_has_every_name_that_is_public_or_on_a_page_and_the_axis_legend() -> (
    None
):
    page = (ROOT / "docs" / "reference" / "api.md").read_text()
    paths = set(re.findall(r"^::: (\S+)", page, re.MULTILINE))
    named = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (vmoe, vmoe.analysis, vmoe.classic, vmoe.multitask)
        for name in module.__all__
        if not inspect.ismodule(getattr(module, name))
    }
    named |= imported()
    where = {name: path_of(each) for name, each in named.items()}
    for name, path in where.items():
        assert {name, path, path.rpartition(".")[0]} & paths, name
    legend = vmoe.axes.__doc__.partition("letters:\n\n")[2].partition("\n\n")[0]
    for meaning in re.findall(r"(?:^ +|  )((?:\w )+ *\S.*?)(?=  |$)", legend, re.MULTILINE):
        letters, words = re.fullmatch(r"((?:\w )+) *(.*)", meaning).groups()
        assert f"| `{letters.strip()}` | {words.partition(' (')[0]}" in page, meaning


def test_the_table_of_routers_has_every_router_and_says_which_drop_choices() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    table = page.partition("## The routers side by side")[2].partition("## ")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| `")]
    drops = {name: row[4] == "yes" for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert drops == {router.__name__: router().can_drop for router in ROUTERS}


def test_the_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        found = re.findall(
            r"[`(\s]((?:configs|notebooks|scripts|tests|vmoe)/[\w./-]+)[`)\s:]",
            (ROOT / page).read_text(),
        )
        paths = {path for path in found if "NAME" not in path} - {EXAMPLE}
        assert not [path for path in paths if not (ROOT / path).exists()], page


def test_the_tests_that_the_pages_name_exist() -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    existing = set(re.findall(r"^def (test_\w+)", tests, re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"`(test_\w+_\w+_\w+)`", (ROOT / page).read_text()))
        assert named <= existing, (page, named - existing)


def test_the_page_of_the_configs_has_every_config_once() -> None:
    text = (ROOT / "configs" / "README.md").read_text()
    linked = re.findall(r"\]\((\w+\.py)\)", text)
    assert sorted(linked) == sorted(path.name for path in (ROOT / "configs").glob("*.py"))


def test_the_page_of_the_scripts_has_every_script() -> None:
    """Files that a shell runs, and modules with a ``main``."""
    tables = (ROOT / "scripts" / "README.md").read_text()
    first_cells = re.findall(r"^\| (`.*?) \|", tables, re.MULTILINE)
    named = [name for cell in first_cells for name in re.findall(r"`(.*?)`", cell)]
    folder = ROOT / "scripts"
    runs = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix in SHELL}
    for path in folder.rglob("*.py"):
        if '\nif __name__ == "__main__":' in path.read_text():
            module = path.parent if path.name == "__main__.py" else path.with_suffix("")
            runs.add("-m " + ".".join(module.relative_to(ROOT).parts))
    runs |= {f"-m scripts.experiments {name}" for name in EXPERIMENTS}
    inner = {"-m scripts.experiments", "-m scripts.experiments.claims.measure"}
    inner |= {f"-m scripts.bench.{name}" for name in ("devices", "first_batch")}
    inner |= {f"-m scripts.maintain.docs.{name}" for name in ("reference", "site")}
    assert sorted(named) == sorted(runs - inner)


def test_the_papers_evaluation_on_the_page_of_differences_fits_a_run() -> None:
    lines = (ROOT / "docs" / "differences.md").read_text().splitlines()
    (line,) = (line for line in lines if "`evaluations=(" in line)
    evaluations = eval(line.partition("`evaluations=")[2].partition("`")[0], vars(vmoe.config))
    ours = vmoe.config.TrainConfig(
        data=vmoe.config.DataConfig(
            preprocessing=vmoe.config.PreprocessingConfig(
                exif="`--data.preprocessing.no-exif`" not in line
            )
        ),
        evaluations=evaluations,
    )
    published = vmoe.config.load(ROOT / "configs" / "imagenet1k_s32_light.py")
    assert ours.evaluations[0].preprocessing == published.evaluations[0].preprocessing
