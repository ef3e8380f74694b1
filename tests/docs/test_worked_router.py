"""The router of docs/extending.md, registered in a copy of the library as the page says.

In the copy the property tests pass for it, it trains, and the page of the routing shows it.
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

PARTS = ("vmoe", "configs", "tests", "pyproject.toml")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1, (path, old)
    path.write_text(text.replace(old, new))


@pytest.mark.slow
def test_the_router_of_the_page_has_the_properties_trains_and_is_seen_in_the_page(
    tmp_path: Path,
) -> None:
    page = (ROOT / "docs" / "extending.md").read_text().partition("## A gate")[0]
    steps = re.findall(r"^   ```\n(.*?)^   ```", page, re.DOTALL | re.MULTILINE)
    config, module, line, exemption = map(textwrap.dedent, steps)
    for part in PARTS:
        copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy
        copy(ROOT / part, tmp_path / part)
    routing = tmp_path / "vmoe" / "routing"
    routers = tmp_path / "vmoe" / "config" / "routers.py"
    edit(routers, "\nRouter = ", f"\n{config}\n\nRouter = Threshold | ")
    (routing / "threshold.py").write_text(module)
    registry, imports = routing / "__init__.py", "from vmoe.config.routers import Threshold\n"
    edit(registry, "    Switch: switch,\n", f"    Switch: switch,\n    {line}")
    edit(registry, "    switch,\n", "    switch,\n    threshold,\n")
    edit(registry, "from vmoe.routing import (\n", f"{imports}from vmoe.routing import (\n")
    properties = tmp_path / "tests" / "routing" / "test_properties.py"
    edit(properties, "\nTESTED = ", f"\n{exemption}\nTESTED = ")

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

    tested = run("pytest", "-q", "-n0", "tests/routing/test_properties.py", "-k", "threshold")
    assert int(re.findall(r"(\d+) passed", tested)[0]) >= 10
    (commands,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    printed = [run(*shlex.split(command)) for command in commands.splitlines()]
    assert "step 200/200" in printed[0]
    html = (tmp_path / "threshold.html").read_text()
    (model,) = json.JSONDecoder().raw_decode(html[html.index('{"summary"') :])[0]["models"]
    assert [block["chosen"]["shape"][-1] for block in model["blocks"]] == [2, 2]  # k
