"""Fitted estimators as files: arrays and JSON in the format of safetensors, never code.

A file has the parameters by path, and under ``JSON`` the bytes of a JSON text with the class, the
settings, the encoder, the tasks, the number of axes of an array as y, the history, the number of
epochs, the findings and the requests of metadata. The metadata of the file are the format, its
version, and the SHA-256 of all arrays.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import sklearn
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vmoe.errors import UsageError, naming, parse_json, reading, writing
from vmoe.host import forks
from vmoe.host.cache import atomic
from vmoe.multitask.as_json import from_json, to_json
from vmoe.multitask.build import GATED
from vmoe.multitask.columns import TableEncoder
from vmoe.multitask.fitting import model_of
from vmoe.multitask.settings import check_settings, kept, names_of
from vmoe.multitask.targets import in_order
from vmoe.multitask.tasks import KINDS, Classification, Task
from vmoe.multitask.values import type_of
from vmoe.trees import by_name

FORMAT, VERSION = "vmoe.multitask", "1"
JSON = "json"
CONTENT = {
    *("class", "settings", "encoder", "tasks", "y_ndim"),
    *("history", "n_epochs", "findings", "requests"),
}
METHODS = ("fit", "partial_fit", "score")  # that take metadata of scikit-learn
FIELDS: dict[str, dict[str, type]] = {  # of the tasks by kind
    "classification": {"name": str, "type": str, "classes": np.ndarray, "size": int},
    "regression": {"name": str, "mean": float, "std": float},
    "count": {"name": str, "mean": float},
}
ATTRIBUTES = {
    *("model_", "tasks_", "history_", "n_epochs_", "findings_", "n_parameters_", "expert_names_"),
    *("n_features_in_", "feature_names_in_", "_metadata_request"),
    *("_encoder", "_training", "_fixed", "_experts_seen", "_y_ndim"),
}


def write(path: Path, estimator: Any) -> None:
    """Writes a fitted estimator; an existing file is replaced at the end.

    Raises:
        ValueError: a setting has a type that JSON does not have, or decides the model and was
            changed after ``fit``, or is none of ``__init__`` and was changed after it; or the
            estimator has attributes of its own.
    """
    params = by_name(nnx.state(estimator.model_, graph=True))
    arrays = {name: np.asarray(each, order="C") for name, each in params.items()}
    settings = estimator.get_params(deep=False)
    if own := sorted(vars(estimator).keys() - names_of(estimator) - ATTRIBUTES):
        raise ValueError(
            f"{own[0]}: a file has no attributes of your own: delete it, or make it a setting"
        )
    kind = type(estimator)
    content = {
        "class": kind.__name__,
        "settings": {name: to_json(name, value) for name, value in settings.items()},
        "encoder": estimator._encoder.to_json(),
        "tasks": [
            [of_task, to_json(f"task {name!r}", vars(task))]
            for name, task in estimator.tasks_.items()
            for of_task in KINDS
            if type(task) is KINDS[of_task]
        ],
        "y_ndim": estimator._y_ndim,
        "history": to_json("history_", estimator.history_),
        "n_epochs": estimator.n_epochs_,
        "findings": estimator.findings_,
        "requests": {
            method: getattr(estimator.get_metadata_routing(), method).requests for method in METHODS
        },
    }
    check_settings(estimator, estimator._fixed)
    made = kept(kind(**settings), names_of(estimator) - settings.keys())
    remedy = "make it a parameter there, as a file has no other settings"
    check_settings(estimator, made, f"__init__ of {kind.__name__}", remedy)
    arrays[JSON] = np.frombuffer(json.dumps(content).encode(), np.uint8)
    metadata = {"format": FORMAT, "version": VERSION, "sha256": sha256(arrays)}
    with writing(path), atomic(path) as temporary:
        temporary.write_bytes(save(arrays, metadata))


def read(path: Path, classes: Mapping[str, type[Any]]) -> Any:
    """The fitted estimator of a file.

    Args:
        classes: those that it may be of, by name.

    Raises:
        ValueError: the file is damaged, of another format or version, or of another class.
    """
    forks.computes()
    with reading(path, "it cannot be used", "; save the model again"), naming(path):
        arrays = read_arrays(path)
        content = {"y_ndim": None} | parse_json(arrays.pop(JSON).tobytes())  # older files lack it
        if unknown := content.keys() ^ CONTENT:
            raise ValueError(f"{min(unknown)!r:.40} is missing or unknown")
        if content["class"] not in classes:
            raise ValueError(
                f"its class is {content['class']!r:.40}, not {' or '.join(classes)}: call load of "
                "its class"
            )
        settings = {name: from_json(value) for name, value in content["settings"].items()}
        estimator = classes[content["class"]](**settings)
        if left_out := estimator.get_params(deep=False).keys() - settings:
            raise ValueError(f"the setting {min(left_out)!r} is missing")
        estimator._validate_params()
        encoder = TableEncoder.from_json(content["encoder"])
        tasks = new_tasks(estimator, content["tasks"])
        set_attributes(estimator, encoder, tasks, content)
        values = sum(each.size for each in arrays.values())
        sizes = [len(each) * each.size for each in encoder.vocabularies]
        sizes += sizes_of(estimator, len(tasks))
        if max(sizes) > max(values, 1000):  # even shapes of so many modules need memory
            raise ValueError(f"it asks for {max(sizes)} parts and has {values} parameters")
        outline = nnx.eval_shape(lambda: model_of(estimator, encoder, tasks, 0))
        graph, params = nnx.split(outline, graph=True)
        names = by_name(params)
        if shapes_of(names) != shapes_of(arrays):
            raise ValueError("its parameters are not those of its settings")
        for name, each in arrays.items():
            if not np.isfinite(each).all():
                raise ValueError(f"{name} has values that are NaN or infinite")
        leaves = [jnp.asarray(arrays[name]) for name in names]
        model = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(params), leaves))
        estimator._keep(model, encoder, tasks, content["findings"])
    return estimator


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, after their SHA-256 was checked."""
    try:
        path.open("rb").close()  # safetensors reports each file that it cannot open as missing
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UsageError("no estimator of vmoe.multitask: give a file of its save")
            if (version := metadata.get("version")) != VERSION:
                raise UsageError(
                    f"format version {version!r:.20}, this version of vmoe reads {VERSION}: use "
                    "the version that wrote it"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except OSError as error:
        raise UsageError(f"{error.strerror or error}: give a file of save") from None
    except SafetensorError as error:
        raise UsageError(f"damaged or no such file ({error}): save it again") from None
    if metadata.get("sha256") != sha256(arrays):
        raise UsageError("its SHA-256 differs from the stored one: save the model again")
    return arrays


def new_tasks(estimator: Any, given: list[Any]) -> dict[str, Task]:
    """The tasks of a file, in the order of the chain if there is one."""
    found = {}
    for kind, content in given:
        attributes = from_json(content)
        types = {name: type(value) for name, value in attributes.items()}
        if kind not in estimator._kinds or types != FIELDS[kind]:
            raise ValueError(f"a task has kind {kind!r:.20} and {sorted(attributes)}")
        task = KINDS[kind].__new__(KINDS[kind])
        vars(task).update(attributes)
        numbers = [attributes.get("mean", 0.0), attributes.get("std", 1.0)]
        if isinstance(task, Classification):
            n = len(task.classes)
            sound = n > 1 and task.size == (1 if n == 2 else n)
            sound = sound and np.array_equal(np.unique(task.classes), task.classes)
            sound = sound and type_of("its classes", task.classes) == task.type
        else:
            sound = np.isfinite(numbers).all() and numbers[1] > 0
        if not sound or task.name in found:
            raise ValueError(f"task {task.name!r:.40} has other values than a fit gives it")
        found[task.name] = task
    ordered = in_order(estimator, dict.fromkeys(found, np.zeros(0)))
    if list(ordered) != list(found) or (
        estimator.chain is not None and {t.size for t in found.values()} != {1}
    ):
        raise ValueError(f"its tasks are {list(found)}")
    return found


def set_attributes(
    estimator: Any, encoder: TableEncoder, tasks: Mapping[str, Task], content: Mapping[str, Any]
) -> None:
    """Sets what a file has beside the model."""
    estimator.history_, estimator.n_epochs_ = from_json(content["history"]), content["n_epochs"]
    for number, row in enumerate(estimator.history_, 1):
        sound = row["epoch"] == number and isinstance(row["seconds"], float)
        if not sound or row["train"].keys() != tasks.keys():
            raise ValueError("its history is of another model")
    if (
        type(estimator.history_) is not list
        or type(estimator.n_epochs_) is not int
        or not 1 <= estimator.n_epochs_ <= len(estimator.history_)
        or type(content["findings"]) is not list
        or not all(isinstance(each, str) for each in content["findings"])
    ):
        raise ValueError("its history, n_epochs or findings have other values than a fit gives")
    estimator.n_features_in_ = len(encoder.names)
    if all(isinstance(name, str) for name in encoder.names):
        estimator.feature_names_in_ = np.array(encoder.names, object)
    with sklearn.config_context(enable_metadata_routing=True):
        for method in METHODS:
            getattr(estimator, f"set_{method}_request")(**content["requests"][method])
    estimator._training, estimator._y_ndim = None, content["y_ndim"]
    names = {None: set(tasks), 1: {"0"}, 2: {str(i) for i in range(len(tasks))}}
    if names[estimator._y_ndim] != set(tasks):
        raise ValueError("its tasks are not those of an array as y")


def sizes_of(estimator: Any, tasks: int) -> list[int]:
    """Sizes of the model that an estimator makes, none of which is above that of its parameters.

    They are numbers of modules, each of which has a parameter, and sizes of layers.
    """
    kind = estimator.architecture
    units, towers, gate = map(estimator.units, ("expert_units", "tower_units", "gate_units"))
    layers = estimator.n_layers if kind == "ple" else 1
    if kind in GATED:
        experts, gates = estimator.n_experts, layers * (1 if kind == "one_gate" else tasks)
    else:
        experts, gates, gate = 1 if kind == "shared_bottom" else tasks, 0, ()
    if kind in ("cgc", "ple"):
        experts += tasks * estimator.n_task_experts
    modules = [
        layers * experts * max(1, len(units)),
        tasks * (len(towers) + 1),
        gates * (len(gate) + 1),
    ]
    return [*modules, *units, *towers, *gate]


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (each.shape, np.dtype(each.dtype)) for name, each in arrays.items()}


def sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, each in sorted(arrays.items()):
        digest.update(f"{name} {each.dtype.str} {each.shape}\n".encode())
        digest.update(each.tobytes())
    return digest.hexdigest()
