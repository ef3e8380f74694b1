"""What all tests share: the compilation cache, the devices, and where the golden files lie."""

import os
from pathlib import Path

import jax
import pytest

ROOT = Path(__file__).parent.parent

# Compiling is most of what the tests do. Without optimisations and with the older of XLA's two code
# generators it takes a third of the time, and the compiled programs run half as fast. Every program
# is cached for the other processes, also those that compile in milliseconds.
# test_golden.py, which measures rounding, compiles as users do.
FLAGS = ("--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1")
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()
SETTINGS = {
    "jax_disable_most_optimizations": True,
    "jax_compilation_cache_dir": str(ROOT / ".cache" / "jax"),
    "jax_persistent_cache_min_compile_time_secs": 0,
}
for name, value in SETTINGS.items():
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)  # for the commands that tests run


# With tests of half a minute and more: first, so that none is left for the end of a run.
LONGEST = ("test_processes.py", "test_stops.py", "test_scripts.py")
DEVICES = 8  # that tests/devices sees, in a pytest of its own; all other tests see one


def _on_devices(config: pytest.Config) -> bool:
    return any("devices" in Path(word).parts for word in config.args)


def pytest_configure(config: pytest.Config) -> None:
    if _on_devices(config):
        jax.config.update("jax_num_cpu_devices", DEVICES)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    ignored = collection_path.name == "devices" and not _on_devices(config)
    return True if ignored else None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden", default=str(ROOT / "tests" / "golden"), help="folder of .npz files"
    )
    parser.addoption("--slow", action="store_true", help="run what takes minutes too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
    items.sort(key=lambda item: item.path.name not in LONGEST)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden" in metafunc.fixturenames:
        files = sorted(Path(metafunc.config.getoption("--golden")).glob("*.npz"))
        metafunc.parametrize("golden", files, ids=[file.stem for file in files], indirect=True)
