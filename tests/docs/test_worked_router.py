"""The router of docs/extending.md, in its own file, and the expert, in a copy of the library.

They train together, and the page of the routing shows the router.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.command import ROOT

pytestmark = pytest.mark.process

PARTS = ("vmoe", "configs", "tests", "pyproject.toml")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


def steps_of(section: str) -> list[str]:
    """The code of each step in a list of steps."""
    blocks = re.findall(r"^   ```\n(.*?)^   ```", section, re.DOTALL | re.MULTILINE)
    return list(map(textwrap.dedent, blocks))


def commands_of(section: str) -> list[list[str]]:
    (block,) = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    return [shlex.split(command) for command in block.replace("\\\n", " ").splitlines()]


def add_expert(library: Path, config: str, module: str, entry: str, tables: str) -> None:
    experts, union = library / "vmoe" / "config" / "experts.py", "ListedExpert = (\n    "
    edit(experts, f"\n{union}", f"\n{config}\n\n{union}LowRankExpert | ")
    nn = library / "vmoe" / "nn" / "experts"
    with (nn / "modules.py").open("a") as modules:
        modules.write(f"\n\n{module}")
    make, imports = nn / "make.py", "from vmoe.config.experts import (\n"
    edit(make, imports, f"{imports}    LowRankExpert,\n")
    edit(make, "    ZeroExpert: ", f"{textwrap.indent(entry, '    ')}    ZeroExpert: ")
    tests = library / "tests" / "nn" / "test_expert_modules.py"
    edit(tests, "\ndef mlp(", f"\n{tables}\n\ndef mlp(")
    imports = "from vmoe.config.experts import LowRankExpert\n"
    edit(tests, "from vmoe.config import (\n", f"{imports}from vmoe.config import (\n")


@pytest.mark.slow
def test_the_router_of_the_page_trains_by_command_with_the_expert_in_a_copy_and_is_seen_in_the_page(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "extending.md").read_text()
    router = page.partition("## A gate")[0]
    expert = page.partition("## An expert")[2].partition("## A data source")[0]
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    add_expert(tmp_path, *steps_of(expert))
    own, _, config = re.findall(r"```python\n(.*?)```", router, re.DOTALL)
    (tmp_path / "threshold.py").write_text(f"{own}\n{config}")

    def run(*arguments: str) -> str:
        result = subprocess.run(
            [sys.executable, "-m", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout + result.stderr

    tested = run("pytest", "-v", "-n0", "tests/nn/test_expert_modules.py", "-k", "low_rank")
    assert "[low_rank] PASSED" in tested
    train, routing = commands_of(router)
    ((*_, kind, name, setting, value, steps, number),) = commands_of(expert)
    assert [kind, steps, number] == ["--model.moe.experts.kind", "--steps", "200"]
    fewer = [{number: "10"}.get(word, word) for word in train]  # training is most of the time
    options = (kind, name, setting, value, "--optim.warmup-steps", "5")
    only_sparse = ("--model.depth", "1", "--model.sparse-blocks", "0")
    assert "step 10/10" in run(*fewer, *options, *only_sparse)
    model = json.loads((tmp_path / "runs" / "threshold" / "config.json").read_text())["model"]
    for own, expected in {
        "experts": {"kind": "low_rank", "rank": 8},
        "router": {"kind": "threshold", "k": 2, "target": 1.5, "rate": 0.001},
    }.items():
        assert expected.items() <= model["moe"][own].items()
    run(*routing, "--images", "16")
    html = (tmp_path / "threshold.html").read_text()
    (model,) = json.JSONDecoder().raw_decode(html[html.index('{"summary"') :])[0]["models"]
    assert [block["chosen"]["shape"][-1] for block in model["blocks"]] == [2]  # k
