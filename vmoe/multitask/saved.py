"""Fitted estimators as files: arrays and JSON in the format of safetensors, never code.

A file has the parameters by path, and under ``JSON`` the bytes of a JSON text with the class, the
settings, the encoder, the tasks and the other attributes. The metadata are the format, its version,
and the SHA-256 of all arrays.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from vmoe import forks
from vmoe.cache import atomic
from vmoe.errors import parse_json, reading, writing
from vmoe.multitask.as_json import from_json, to_json
from vmoe.multitask.columns import TableEncoder
from vmoe.multitask.tasks import KINDS, Task
from vmoe.trees import by_name

FORMAT, VERSION = "vmoe.multitask", "1"
JSON = "json"


def write(path: Path, estimator: Any) -> None:
    """Writes a fitted estimator; an existing file is replaced at the end.

    Raises:
        ValueError: a setting has a type that JSON does not have, or was changed after ``fit``.
    """
    params = by_name(nnx.state(estimator.model_, graph=True))
    arrays = {name: np.asarray(each, order="C") for name, each in params.items()}
    settings = estimator.get_params(deep=False)
    left_out = {*settings, "model_", "tasks_", "_encoder", "_training"}
    content = {
        "class": type(estimator).__name__,
        "settings": {name: to_json(name, value) for name, value in settings.items()},
        "encoder": estimator._encoder.to_json(),
        "tasks": [
            [kind, to_json(f"task {name!r}", vars(task))]
            for name, task in estimator.tasks_.items()
            for kind in KINDS
            if type(task) is KINDS[kind]
        ],
        "attributes": {
            name: to_json(name, value)
            for name, value in vars(estimator).items()
            if name not in left_out
        },
    }
    check_settings(estimator)
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
    arrays = read_arrays(path)
    with reading(path, "it cannot be used", "; save the model again"):
        content = parse_json(arrays.pop(JSON).tobytes())
        if content["class"] not in classes:
            raise ValueError(f"its class is {content['class']!r:.40}, not {' or '.join(classes)}")
        settings = {name: from_json(value) for name, value in content["settings"].items()}
        estimator = classes[content["class"]](**settings)
        estimator._validate_params()
        estimator._encoder = TableEncoder.from_json(content["encoder"])
        estimator.tasks_ = {task.name: task for task in map(new_task, content["tasks"])}
        for name, value in content["attributes"].items():
            setattr(estimator, name, from_json(value))
        graph, params = outline(estimator)
        names = by_name(params)
        if shapes_of(names) != shapes_of(arrays):
            raise ValueError("its parameters are not those of its settings")
    leaves = [jnp.asarray(arrays[name]) for name in names]
    estimator._training = None
    estimator.model_ = nnx.merge(graph, jax.tree.unflatten(jax.tree.structure(params), leaves))
    return estimator


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of a file, after their SHA-256 was checked."""
    try:
        path.open("rb").close()  # safetensors reports each file that it cannot open as missing
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path}: no estimator of vmoe.multitask: give a file of its save")
            if (version := metadata.get("version")) != VERSION:
                raise ValueError(
                    f"{path}: format version {version!r:.20}, this version of vmoe reads "
                    f"{VERSION}: use the version that wrote it"
                )
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}: give a file of save") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or no such file ({error}): save it again") from None
    if metadata.get("sha256") != sha256(arrays):
        raise ValueError(f"{path}: its SHA-256 differs from the stored one: save the model again")
    return arrays


def new_task(given: list[Any]) -> Task:
    kind, attributes = given
    task = KINDS[kind].__new__(KINDS[kind])
    vars(task).update(from_json(attributes))
    return task


def check_settings(estimator: Any) -> None:
    """Raises a ValueError if the settings of a fitted estimator are for another model."""
    params = by_name(nnx.state(estimator.model_, graph=True))
    if shapes_of(by_name(outline(estimator)[1])) != shapes_of(params):
        raise ValueError("the settings were changed after fit: fit again")


def outline(estimator: Any) -> tuple[nnx.GraphDef, nnx.State]:
    """The structure of the model that an estimator makes, and its parameters as shapes."""
    made = nnx.eval_shape(lambda: estimator._new_model(estimator._encoder, estimator.tasks_, 0))
    return nnx.split(made, graph=True)


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {name: (each.shape, np.dtype(each.dtype)) for name, each in arrays.items()}


def sha256(arrays: Mapping[str, np.ndarray]) -> str:
    """The SHA-256 of arrays with their names, types and shapes."""
    digest = hashlib.sha256()
    for name, each in sorted(arrays.items()):
        digest.update(f"{name} {each.dtype.str} {each.shape}\n".encode())
        digest.update(each.tobytes())
    return digest.hexdigest()
