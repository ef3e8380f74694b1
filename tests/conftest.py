"""Configuration of all tests: the compilation cache, the devices and the golden files."""

import collections
import gc
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jaxtyping
import pytest

from tests import axes
from tests.command import ROOT, TINY, vmoe

# With ``--processes`` the first calls in each test of functions in modules that annotate axes are
# checked against the annotations. Half of all calls are in other modules; pyrefly checks their
# types.
WITH_AXES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "vmoe").rglob("*.py")
    if re.search(r"from jaxtyping|from vmoe.axes(?s:.*)\b(Images|Valid)\b", path.read_text())
}

# Compiling takes most of the tests' time. Without optimizations and with the older of XLA's two
# code generators, the programs of tests/nn/test_vit.py compile in a fifth of the time. Every
# program is cached for the other processes, however fast it compiles. test_golden.py measures
# rounding and compiles as users do.
OLD_GENERATOR = jax.__version_info__ < (0, 11)  # XLA's older generator is in these versions only
FLAGS = ["--xla_cpu_parallel_codegen_split_count=1"]
if OLD_GENERATOR:
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()
SETTINGS = {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(ROOT / ".cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0,
    "jax_traceback_in_locations_limit": 0,  # programs without lines of Python lower faster
}
gc.set_threshold(20_000, 20, 20)  # tracing makes many objects, few of them garbage
for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the commands that tests run
os.environ["XDG_CACHE_HOME"] = str(ROOT / ".cache" / "user")
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # of XLA in the processes that tests start; jax set 1
for name in ("no_proxy", "NO_PROXY"):  # the servers of the tests are on this machine
    os.environ[name] = "127.0.0.1"


# Files with tests of half a minute or more run first, so that no such test starts late.
LONGEST = (
    *("test_notebooks.py", "test_router_comparison.py", "test_distributed.py", "test_stops.py"),
    *("test_worked_router.py", "test_list_of_experts.py", "test_loop.py", "test_scripts.py"),
)
MOST_MAPS = 45_000  # memory maps of a process before its programs are unloaded
STORED = ROOT / "tests" / "golden"  # runs of published models
FORMS = ("soft_slots1", "tiny_last2_k2_bpr_c0.5_indices")
"""Those that are compared by default: one with soft slots, one with choices."""
SMOKE = (  # the one of tests/devices that runs without --processes
    "test_an_moe_layer_has_two_all_to_all_four_with_backward_and_no_all_gather[expert=4-mean]"
)
STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
ALLOWED = ("git", "fc-list")  # a run asks for its commit, matplotlib for the fonts
_may_start_processes = True  # pytest itself may
DEVICES = 8  # of tests/devices, which runs in its own pytest process; other tests have one


def _on_devices(config: pytest.Config) -> bool:
    return any("devices" in Path(word).parts for word in config.args)


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--processes"):
        jaxtyping.install_import_hook(sorted(WITH_AXES), "tests.axes.checked")
    if _on_devices(config):
        jax.config.update("jax_num_cpu_devices", DEVICES)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """Ends a worker at once: freeing some thousand programs one by one takes ten seconds."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # it has sent all reports
        os._exit(0)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()  # modules and tests live to the end, so garbage collection need not visit them


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    ignored = collection_path.name == "devices" and not _on_devices(config)
    return True if ignored else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--golden", default=str(STORED), help="folder of .npz files")
    parser.addoption("--slow", action="store_true", help="also run the long tests")
    processes = "also run the tests with the mark 'process', and check the axes of calls"
    parser.addoption("--processes", action="store_true", help=processes)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "devices" in item.path.parts and item.name != SMOKE:
            item.add_marker("process")
    cases = collections.defaultdict[str, list[pytest.Item]](list)
    for item in items:
        cases[item.nodeid.partition("[")[0]].append(item)
    for each in cases.values():
        if mark := each[0].get_closest_marker("long_after"):
            for item in each[mark.args[0] :]:
                item.add_marker("slow")
    tiers = (("slow", "--slow"), ("process", "--processes"))
    without = [mark for mark, option in tiers if not config.getoption(option)]
    left_out = {item for item in items if any(map(item.get_closest_marker, without))}
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    items.sort(key=lambda item: item.path.name not in LONGEST)


def _no_process(event: str, arguments: tuple[object, ...]) -> None:
    if event in STARTS and not _may_start_processes and arguments[0] not in ALLOWED:
        raise RuntimeError(f"a test without the mark 'process' starts one: {event} {arguments}")


sys.addaudithook(_no_process)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Only tests with the mark ``process`` start processes, but for those in ``ALLOWED``."""
    global _may_start_processes
    _may_start_processes = item.get_closest_marker("process") is not None
    axes.check_again()
    try:
        return (yield)
    finally:
        _may_start_processes = True


@pytest.fixture(scope="module", autouse=True)
def _few_memory_maps() -> Iterator[None]:
    """Unloads the programs of earlier files of tests before they exhaust the process's maps.

    Each takes nine or more of the 65,530 memory maps that Linux allows a process. XLA aborts it if
    there are none left.
    """
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPS:
        jax.clear_caches()
    yield


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of tests/tiny.py by the real command; no test writes to it."""
    workdir = tmp_path_factory.mktemp("tiny") / "run"
    result = vmoe("train", "--config", TINY, "--workdir", workdir, "--steps", "60")
    assert result.returncode == 0, result.stderr
    assert "60 steps, validation accuracy" in result.stdout
    assert re.search(r"\d step 50/60, 83%, epoch 1.27, \S+ left  loss", result.stderr)
    return workdir


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden")).glob("*.npz"))
        long = {file for file in files if file.parent == STORED and file.stem not in FORMS}
        cases = [
            pytest.param(file, id=file.stem, marks=pytest.mark.slow if file in long else ())
            for file in files
        ]
        metafunc.parametrize("golden", cases, indirect=True)
