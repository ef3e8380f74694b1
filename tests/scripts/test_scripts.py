"""The scripts: missing prerequisites, the benchmark, shellcheck, and launching on clusters."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from scripts.bench import classic
from scripts.experiments import check_capacity
from tests.script import experiment, run
from vmoe.data.sources import open_source

ROOT = Path(__file__).parents[2]
PREPARE_EMOJI = [sys.executable, "-m", "scripts.prepare.emoji"]


def script(folder: Path, name: str, python: str) -> subprocess.CompletedProcess[str]:
    """Runs a script of a copy of the project without its environment, from another folder."""
    shutil.copytree(ROOT / "scripts", folder / "scripts")
    for file_name in ("requirements.txt", "pyproject.toml"):
        shutil.copy(ROOT / file_name, folder)
    return subprocess.run(
        ["bash", str(folder / "scripts" / name)],
        capture_output=True,
        text=True,
        cwd="/",
        env=os.environ | {"PYTHON": python, "VENV": ""},
    )


def fake_python(folder: Path, body: str) -> str:
    path = folder / "python3"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.process
@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_a_missing_python_is_reported_with_a_remedy(name: str, tmp_path: Path) -> None:
    result = script(tmp_path, name, "/nowhere/python3")
    assert result.returncode == 1
    assert "Python 3.11 to 3.14 is required, but /nowhere/python3 is missing" in result.stderr
    assert "PYTHON=/path/to/python3" in result.stderr


@pytest.mark.process
@pytest.mark.parametrize("name", ["quickstart.sh", "test.sh"])
def test_a_python_without_venv_is_reported_with_the_package_to_install(
    name: str, tmp_path: Path
) -> None:
    python = fake_python(tmp_path, 'case "$2" in *ensurepip*) exit 1;; esac')
    result = script(tmp_path, name, python)
    assert result.returncode == 1 and "apt install python3-venv" in result.stderr
    assert not (tmp_path / ".venv").exists()


@pytest.mark.process
def test_the_extras_are_installed_once_and_that_of_the_tests_includes_that_of_the_site(
    tmp_path: Path,
) -> None:
    make = "mkdir -p .venv/bin; cp $0 .venv/bin/python"
    pip = 'for last; do :; done; echo "$last" >>log; echo "Collecting jax"; exit ${PIP:-0}'
    python = fake_python(tmp_path, f'case "$2" in venv) {make};; pip) {pip};; esac')
    for name in ("scripts/environment.sh", "requirements.txt", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)

    def calls(*installs: str, **environment: str) -> subprocess.CompletedProcess[str]:
        lines = "; ".join(f'install "{extra}"' for extra in installs)
        return subprocess.run(
            ["bash", "-c", f"source scripts/environment.sh; {lines}; echo end"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=os.environ | {"PYTHON": python, "VENV": ""} | environment,
        )

    failed = calls("", PIP="1")
    assert failed.returncode == 1 and "could not be installed" in failed.stderr
    done = calls("", "[docs]", "[test]", "[docs]", "")
    assert done.stdout.endswith("end\n") and done.stdout.count("\n.\n") == 3  # a dot a package
    assert (tmp_path / "log").read_text().split() == [".", ".", ".[docs]", ".[test]"]


def test_each_part_of_the_quick_start_says_how_long_it_takes() -> None:
    text = (ROOT / "scripts" / "quickstart.sh").read_text()
    parts = re.findall(r'^step "(.*?)"$', text, re.MULTILINE | re.DOTALL)
    assert len(parts) == 4 and all(re.search("minute|second", part) for part in parts)


@pytest.mark.process
@pytest.mark.slow
def test_the_bench_writes_ratios_to_references_and_a_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--experts 2 --tokens 196 --width 8 --hidden 16 --rows 600 --repeats 1 --compile"
    sections = ("routing", "layer", "start", "parallel", "classic")
    run("bench.__main__", "--out", tmp_path / "bench", *sections, *sizes.split())
    measured = json.loads((tmp_path / "bench.json").read_text())
    assert measured["peak_rss_mb"] > 0 and measured["machine"]["jax"]
    rows = {(row["section"], row["what"], row["to"]): row for row in measured["rows"]}
    for row in rows.values():
        # Python's own start is subtracted from that of a command, and can have taken longer.
        value = row["ms"] or row["sent_mb"] or row["temp_mb"]
        assert (value > 0 or row["section"] == "start") and (row["to"] == "") == (
            row["ratio"] is None
        )
    for key in (
        ("layer", "layer, forward", "batched experts, forward"),
        ("layer", "layer, f+b", "batched experts, f+b"),
        ("layer", "capacity 0.5", "capacity 1.05"),
        ("layer", "auto, f+b", "batched, f+b"),
        ("start", "vmoe --help", ""),
        ("parallel", "all-to-all of 8 devices, f+b", "slots x width"),
    ):
        assert rows[key]["target"], key
    assert rows[key]["ratio"] == pytest.approx(1.0)
    assert (tmp_path / "bench.png").read_bytes().startswith(b"\x89PNG")
    assert ("routing", "by cumulative sum", "vmoe") in rows
    assert ("parallel", "no capacity: 0% dropped", "fixed capacity") in rows
    assert ("layer", "layer, f+b", "experts alone, f+b") in rows
    assert ("classic", "loop of NumPy", "vmoe") in rows
    assert "batched experts" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        run("bench.__main__", "layers")
    assert "no section 'layers'" in capsys.readouterr().err


@pytest.mark.process
def test_the_bench_says_why_it_leaves_flexmix_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert classic.flexmix(*classic.problem(10)) is None
    assert capsys.readouterr().err == "flexmix is left out: there is no Rscript\n"
    fake = tmp_path / "Rscript"
    fake.write_text("#!/bin/sh\necho 'Error: there is no\n package' >&2; exit 1\n")
    fake.chmod(0o755)
    assert classic.flexmix(*classic.problem(10)) is None
    assert capsys.readouterr().err == "flexmix is left out: Error: there is no package\n"
    assert classic.flexmix(*classic.problem(10_001)) is None
    assert "more than 10,000 rows; --rows 10000 measures it" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.slow
def test_per_block_and_uniform_routing_are_compared_on_the_test_split(
    tiny_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment("check_capacity", tiny_run, "--data", "digits", "--images", "64")
    table = capsys.readouterr().out.splitlines()
    first, _, *rows = (line.strip("| ").split(" | ") for line in table)
    assert len(rows) > 1 and all(len(row) == len(first) for row in rows)
    budget, trained, per_block, uniform, *differences = rows[0][:6]
    assert (budget, *differences) == ("1x", "+0.00 ± 0.00", "+0.00 ± 0.00")
    assert trained == per_block == uniform


def evaluated(*right: int) -> SimpleNamespace:
    """An evaluation of five images, the last one without a label."""
    images = np.arange(5)
    labels = np.where(images < 4, 7, -1)[:, None]
    per_example = SimpleNamespace(correct=np.isin(images, right), labels=labels)
    return SimpleNamespace(accuracy=len(right) / 4, per_example=per_example)


def compared(groups: str) -> dict[str, Any]:
    """The row of a budget, with the group of each image."""
    setting = [{"k": 1, "capacity_factor": 0.5, "priority": "largest_gate"}]
    rows = {"test": evaluated(0, 1, 2), "test_uniform": evaluated(1, 3), "setting": setting}
    rows |= {"trained": evaluated(0, 1, 2, 3), "groups": list(groups)}
    return rows | {"accuracy": 0.25, "accuracy_uniform": 0.125}


def test_a_model_that_is_compared_twice_is_no_more_evidence_than_once() -> None:
    """The error of a difference is over the labeled images, each with its mean over the models."""
    rows = compared("abcde")
    (line,) = check_capacity.lines_of([{0.5: rows}])
    from_uniform, from_trained = (
        100 * np.std(each, ddof=1) / np.sqrt(4) for each in ([1, 0, 1, -1], [0, 0, 0, -1])
    )
    figures = ["100.00", "75.00", "50.00", f"+25.00 ± {from_uniform:.2f}"]
    figures += [f"-25.00 ± {from_trained:.2f}", "25.00", "12.50"]
    assert line == ["0.5x", *figures, "1, 0.5, largest gate"]
    assert list(check_capacity.lines_of([{0.5: rows}] * 2)) == [line]


def test_drawings_of_one_emoji_are_no_more_evidence_than_one() -> None:
    (line,) = check_capacity.lines_of([{0.5: compared("aabbc")}])
    error = 100 * np.std([0.5, 0.0], ddof=1) / np.sqrt(2)  # of two emoji
    assert line[4] == f"+25.00 ± {error:.2f}"


@pytest.mark.process
def test_a_model_that_is_missing_ends_the_comparison_with_the_message_of_the_search(
    capfd: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        check_capacity.rows_of("gone", "digits", 64)
    assert ended.value.code == 2 and "gone: no such file" in capfd.readouterr().err


def emoji_package(
    folder: Path,
    vendor: str,
    names: list[str],
    texts: Mapping[str, str] = MappingProxyType({}),
    copies: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """A package of emoji-datasource with one drawing per name, half of it transparent.

    Args:
        texts: the longer names of emoji.
        copies: emoji that look as another one, by name.
    """
    emoji = [
        {
            "name": texts.get(name, ""),
            "short_name": name,
            "category": "Component" if name == "tone" else f"Things & {name[0]}",
            "subcategory": "made-up",
            "image": f"{name}.png",
            f"has_img_{vendor}": name != f"not_{vendor}",
            "skin_variations": {"X": {"image": f"{name}-x.png", f"has_img_{vendor}": True}},
        }
        for name in names
    ]
    drawings = folder / "img" / vendor / "64"
    drawings.mkdir(parents=True)
    (folder / "emoji.json").write_text(json.dumps(emoji))
    pixels = np.zeros((64, 64, 4), np.uint8)
    for name in names:
        pixels[:32] = (200, names.index(copies.get(name, name)), 0, 255)
        for file in (f"{name}.png", f"{name}-x.png"):
            Image.fromarray(pixels).save(drawings / file)
    return folder


def prepare_emoji(
    destination: Path, packages: Mapping[str, Path], *options: str
) -> subprocess.CompletedProcess[str]:
    command = [*PREPARE_EMOJI, str(destination)]
    given = [word for vendor, path in packages.items() for word in (f"--{vendor}", str(path))]
    return subprocess.run([*command, *given, *options], capture_output=True, text=True)


@pytest.mark.process
def test_emoji_are_split_by_name_and_composited_on_white(tmp_path: Path) -> None:
    names = [*(f"{letter}{i}" for letter in "ab" for i in range(30)), "tone", "not_google"]
    packages = {
        vendor: emoji_package(tmp_path / vendor, vendor, names) for vendor in ("google", "twitter")
    }
    for folder, options, per_emoji in (("base", [], 1), ("tones", ["--skin-tones"], 2)):
        result = prepare_emoji(tmp_path / folder, packages, *options)
        assert result.returncode == 0, result.stderr
        splits_of: dict[str, set[str]] = {}
        for file in (tmp_path / folder).rglob("*.png"):
            splits_of.setdefault(file.stem.split("-")[0], set()).add(file.parts[-3])
            assert file.parent.name == f"Things & {file.name[0]}"
        assert splits_of.keys() == set(names) - {"tone"}
        assert all(len(splits) == 1 for splits in splits_of.values())
        assert set.union(*splits_of.values()) == {"train", "validation", "test"}
        count = len(list((tmp_path / folder / "train").rglob("a*.png")))
        train = sum(splits == {"train"} for name, splits in splits_of.items() if name[0] == "a")
        assert count == train * 2 * per_emoji
    image = np.asarray(Image.open(next((tmp_path / "base").rglob("a*.png"))))
    assert (image[:32, :, ::2] == (200, 0)).all() and (image[32:] == 255).all()
    assert "CC-BY" in (tmp_path / "base" / "SOURCES.txt").read_text()


@pytest.mark.process
def test_emoji_lists_have_categories_by_vendor_and_frequent_words_and_no_copies_of_training_emoji(
    tmp_path: Path,
) -> None:
    names = [f"{letter}{i}" for letter in "ab" for i in range(20)]

    def prepared(
        folder: Path, texts: dict[str, str], copies: dict[str, str], *options: str
    ) -> Path:
        packages = {
            "google": emoji_package(folder / "google", "google", names, texts),
            "twitter": emoji_package(folder / "twitter", "twitter", names, texts, copies),
        }
        result = prepare_emoji(folder / "data", packages, *options)
        assert result.returncode == 0, result.stderr
        return folder / "data"

    plain = prepared(tmp_path / "plain", {}, {})
    splits = {path.stem.split("-")[0]: path.parts[-3] for path in plain.rglob("*.png")}
    train = [name for name in names if splits[name] == "train"]
    held_out = [name for name in names if splits[name] != "train"]
    texts = dict.fromkeys(train[:10], "TEN OF THE") | dict.fromkeys(train[10:19], "NINE")
    texts |= dict.fromkeys(held_out, "NINE TEN")
    data = prepared(tmp_path / "copied", texts, {held_out[0]: train[0]}, "--skin-tones")

    kept = set(names) - {held_out[0]}
    for vendor in ("google", "twitter"):
        lines = (data / f"{vendor}.csv").read_text().splitlines()
        expected = {
            f"{splits[name]}/{category}/{name}-{vendor}.png,{category},{splits[name]}"
            for name in kept
            for category in [f"Things & {name[0]}"]
        }
        assert lines[0] == "path,label,split" and set(lines[1:]) == expected
        assert len(lines) == 1 + len(kept)
    words = open_source(f"manifest:{data / 'google_words.csv'}", "train")
    assert words.class_names == ("made", "ten", "up")
    assert len(words) == len(train) and words.max_labels == 3
    assert sum(1 in words.labels_of(i) for i in range(len(train))) == 10


@pytest.mark.process
def test_emoji_packages_are_downloaded_with_npm(tmp_path: Path) -> None:
    """A fake npm packs what it is asked for."""
    for vendor in ("google", "twitter"):
        emoji_package(
            tmp_path / f"{vendor}-16.0.0" / "package", vendor, [f"a{i}" for i in range(9)]
        )
    npm = tmp_path / "npm"
    npm.write_text(
        '#!/bin/sh\n[ "$1 $2" = "pack --silent" ] || exit 1\nname=${3%@*} version=${3#*@}\n'
        f'tar -czf "$name-$version.tgz" -C "{tmp_path}/${{name##*-}}-$version" package\n'
    )
    npm.chmod(0o755)
    result = subprocess.run(
        [*PREPARE_EMOJI, str(tmp_path / "out")],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "downloading emoji-datasource-twitter@16.0.0 with npm pack" in result.stderr
    assert len(list((tmp_path / "out").rglob("*.png"))) == 2 * 9


@pytest.mark.process
def test_a_corrupt_emoji_package_leaves_nothing_behind(tmp_path: Path) -> None:
    package = emoji_package(tmp_path / "google", "google", ["a"])
    next((package / "img").rglob("a.png")).write_bytes(b"no image")
    command = [*PREPARE_EMOJI, str(tmp_path / "out")]
    for options, message in (
        (("--google", package, "--twitter", tmp_path), "a.png: cannot identify image"),
        (("--google", tmp_path / "gone", "--twitter", tmp_path), "No such file or directory"),
    ):
        line = [*command, *map(str, options)]
        result = subprocess.run(line, capture_output=True, text=True)
        assert result.returncode == 1 and message in result.stderr
        assert result.stderr.count("\n") == 1
        assert sorted(path.name for path in tmp_path.iterdir()) == ["google"]


@pytest.mark.process
def test_shell_scripts_pass_shellcheck() -> None:
    scripts = [str(path) for path in (ROOT / "scripts").rglob("*.sh")]
    result = subprocess.run(
        [Path(sys.executable).with_name("shellcheck"), "-x", "-P", "SCRIPTDIR", *scripts],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.process
@pytest.mark.parametrize(("status", "queued"), [(0, False), (75, True), (1, False)])
def test_a_slurm_job_requeues_itself_only_after_it_was_stopped_and_saved(
    status: int, queued: bool, tmp_path: Path
) -> None:
    """Fake SLURM commands record their arguments."""
    for name, body in (("srun", f"exit {status}"), ("scontrol", "exit 0")):
        path = tmp_path / name
        path.write_text(f'#!/bin/sh\necho {name} "$@" >>"{tmp_path}/calls"\n{body}\n')
        path.chmod(0o755)
    result = subprocess.run(
        [
            "bash",
            str(ROOT / "scripts" / "launch" / "slurm.sh"),
            "my config.py",
            "runs/x",
            "--steps",
            "3",
        ],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "17"},
    )
    assert result.returncode == status
    srun, *after = (tmp_path / "calls").read_text().splitlines()
    assert srun.startswith("srun --kill-on-bad-exit=1 --cpus-per-task=12 vmoe train ")
    assert srun.endswith("train --config my config.py --workdir runs/x --distributed --steps 3")
    assert after == (["scontrol requeue 17"] if queued else [])


@pytest.mark.process
def test_launch_scripts_print_their_command_in_a_dry_run_and_refuse_missing_arguments() -> None:
    def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script, *rest = arguments
        return subprocess.run(
            ["bash", str(ROOT / "scripts" / "launch" / script), *rest],
            capture_output=True,
            text=True,
            env=os.environ | {"DRY_RUN": "1"},
        )

    shown = dry_run("tpu_pod.sh", "--dry-run", "pod", "us-a", "a b.py", "runs/x").stdout
    assert shown.startswith("gcloud compute tpus tpu-vm ssh pod --zone us-a --worker all --command")
    assert "a\\\\\\ b.py" in shown and "--distributed" in shown
    chunks = ("--model.moe.exchange.chunks", "2")
    shown = dry_run("slurm.sh", "a.py", "runs/x", *chunks).stdout
    command = " vmoe train --config a.py --workdir runs/x --distributed"
    assert shown.endswith(f"{command} {' '.join(chunks)}\n")
    for script in ("slurm.sh", "tpu_pod.sh"):
        result = dry_run(script)
        assert result.returncode == 2 and result.stderr.startswith("usage: ")


def test_a_jobset_sets_the_jax_distributed_variables_of_its_pods() -> None:
    jobset = yaml.safe_load((ROOT / "scripts" / "launch" / "jobset.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    container = job["template"]["spec"]["containers"][0]
    variables = {one["name"]: one.get("value") for one in container["env"]}
    assert variables.keys() == {"JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"}
    assert int(variables["JAX_NUM_PROCESSES"]) == job["completions"] == job["parallelism"]
    assert container["command"][-1] == "--distributed"
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [75]


@pytest.mark.parametrize(
    ("name", "machine"),
    [("slurm.sh", "gpu:h100:8"), ("jobset.yaml", "gpu:h100:8"), ("tpu_pod.sh", "tpu:v5e:4x8")],
)
def test_a_launch_recipe_names_what_was_compiled_for_its_machine(name: str, machine: str) -> None:
    page = (ROOT / "docs" / "results" / "compiled.md").read_text()
    (line,) = re.findall(rf"\| training step \| B/16 \| `{machine}` \|.*", page)
    _, _, _, _, mesh, _, _, _, memory, *_ = (cell.strip() for cell in line.split("|"))
    recipe = (ROOT / "scripts" / "launch" / name).read_text()
    assert f"{memory} of" in recipe and "configs/imagenet21k_b16.py" in recipe
    assert name == "jobset.yaml" or f"--mesh {mesh} --batch-size 4096" in recipe
    assert f"`{mesh}` | {memory} of" in (ROOT / "docs" / "devices.md").read_text()
