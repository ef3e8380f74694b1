"""Fitted models of `vmoe.multitask` for other programs: from rows of a table to outputs.

``write_program`` writes a folder that needs jax and numpy, not vmoe:

    model.jaxexport      the program (numbers, codes, lists) -> outputs, for CPU, CUDA and TPU, with
                         the parameters
    encoder.json         how columns become numbers and codes, and the classes of each task
    README.md            how to run it

``write_onnx`` writes one file, which takes the columns themselves, strings among them.

The outputs are those of a row by name of the task: the probabilities of its classes, or the mean.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from sklearn.utils.validation import check_is_fitted

from vmoe.checkpoints.export.jax_program import PLATFORMS, PROGRAM, README
from vmoe.checkpoints.export.onnx_file import OPSET, check_installed, convert
from vmoe.checkpoints.vmoe_format import new_folder
from vmoe.errors import UsageError, repeated, writing
from vmoe.host.cache import atomic
from vmoe.multitask import MultiTaskEstimator
from vmoe.multitask.as_json import to_json
from vmoe.multitask.columns import Table, TableEncoder, Vocabulary
from vmoe.multitask.tasks import Classification, Count, Regression, Task
from vmoe.multitask.values import as_list

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

FORMAT, VERSION = "vmoe.multitask program", 1
ENCODER = "encoder.json"

TEXT = """\
# A model of several tasks as a program

Inputs: standardized numbers f32[b, n], codes i32[b, c] of categories, and a tuple of codes
i32[b, m] for each column of lists, for any numbers b and m. Outputs by name of the task: the
probabilities f32[b, q] of the classes, or the means f32[b] of numbers and counts.

It runs on CPU, CUDA and TPU, with jax {jax} or later, flatbuffers and numpy, and scikit-learn for
hashes. In this folder:
```python
import datetime
import decimal
import json
from pathlib import Path

import jax.export
import numpy as np

program = jax.export.deserialize(Path("model.jaxexport").read_bytes())
encoder = json.loads(Path("encoder.json").read_text())


def category(given):  # of encoder.json
    if not isinstance(given, dict):
        return given
    ((kind, content),) = given.items()
    if kind == "timedelta":
        return datetime.timedelta(*content)
    return getattr(datetime, kind).fromisoformat(content)


def plain(value):  # equal values have equal texts; None is missing
    if value is None or type(value).__name__ == "NAType" or value != value:
        return None
    for name in ("to_pydatetime", "to_pytimedelta"):  # of pandas
        value = getattr(value, name)() if hasattr(value, name) else value
    if isinstance(value, (np.datetime64, np.timedelta64)):
        value = value.astype(value.dtype.kind + "8[us]").item()
    if isinstance(value, (int, float, decimal.Decimal, np.number, np.bool_)):
        return int(value) if float(value).is_integer() else float(value)
    aware = isinstance(value, datetime.datetime) and value.tzinfo
    return value.astimezone(datetime.timezone.utc) if aware else value


def code(vocabulary, known, value):
    buckets = vocabulary["buckets"]
    if buckets and value is not None:
        from sklearn.utils import murmurhash3_32

        return vocabulary["first"] + murmurhash3_32(str(value), positive=True) % buckets
    return vocabulary["first"] + known.get(value, buckets or len(known))


def encode(rows):  # a list of dicts
    numbers, codes, lists = [np.zeros((len(rows), 0))], [np.zeros((len(rows), 0))], []
    for column in encoder["columns"]:
        values = [row[column["name"]] for row in rows]
        if "mean" in column:
            numbers.append((np.array(values, float)[:, None] - column["mean"]) / column["scale"])
            continue
        vocabulary = encoder["vocabularies"][column["vocabulary"]]
        known = {{category(each): i for i, each in enumerate(vocabulary["categories"])}}
        if not column["lists"]:
            codes.append(np.array([[code(vocabulary, known, plain(each))] for each in values]))
            continue
        found = []
        for row in values:
            row = [plain(each) for each in row] if isinstance(row, (list, np.ndarray)) else []
            row = [each for each in row if each is not None] or [None]
            found.append([code(vocabulary, known, each) for each in row])
        longest = max(map(len, found))
        lists.append(np.array([row + [-1] * (longest - len(row)) for row in found], np.int32))
    return np.hstack(numbers).astype(np.float32), np.hstack(codes).astype(np.int32), tuple(lists)


rows = {rows}
print(jax.jit(program.call)(*encode(rows)))
```
Columns are in the order of `encoder.json`. The code of a category is `first` of its vocabulary plus
its place in `categories`; that of missing and unknown ones is `first` plus their number. With
`buckets`, it is `first` plus MurmurHash3 (32 bits, seed 0, unsigned) of the text in UTF-8, modulo
`buckets`, and `first` plus `buckets` where it is missing. Whole numbers and booleans have the texts
of integers, times with a zone those of UTC. Categories that are dates are objects such as
{{"date": "2020-01-01"}}. Values have the types of those that the model was fitted to, and numbers
are not missing. `tasks` has the classes in the order of the probabilities. JAX
promises to read such a program for at least six months after the version that wrote it. There are
no gradients.
"""


def write_program(folder: str | Path, model: MultiTaskEstimator) -> None:
    """Writes a fitted model as a program of ``jax.export``.

    Args:
        folder: a new or an empty folder.

    Raises:
        UsageError: the folder has files, or JSON cannot have the name of a column.
        ValueError: JSON cannot have the type of a category or a class.
    """
    folder = Path(folder)
    program = export(model)
    encoder = model._encoder
    for name in encoder.names:
        if not isinstance(name, str | int):
            raise UsageError(f"column {name!r}: JSON has names of strings or integers: rename it")
    content = {"format": FORMAT, "version": VERSION, **encoder.to_json(), "tasks": tasks_of(model)}
    with new_folder(folder):
        (folder / PROGRAM).write_bytes(program.serialize())
        (folder / ENCODER).write_text(json.dumps(content, indent=1), encoding="utf-8")
        text = TEXT.format(jax=jax.__version__, rows=[example_row(encoder)])
        (folder / README).write_text(text, encoding="utf-8")


def export(model: MultiTaskEstimator) -> jax.export.Exported:
    """The program (numbers, codes, lists) -> outputs by name of the task, for any number b."""
    check_is_fitted(model, "model_")
    encoder, module = model._encoder, model.model_

    def outputs(
        numbers: jax.Array, codes: jax.Array, lists: tuple[jax.Array, ...]
    ) -> dict[str, jax.Array]:
        return jax.vmap(lambda *row: finished(model, module, Table(*row)))(numbers, codes, lists)

    n_lists = len(encoder.lists)
    sizes = jax.export.symbolic_shape(", ".join(["b", *(f"m{i}" for i in range(n_lists))]))
    single = len(encoder.vocabulary_of) - n_lists
    return jax.export.export(jax.jit(outputs), platforms=PLATFORMS)(
        jax.ShapeDtypeStruct((sizes[0], encoder.num_numbers), jnp.float32),
        jax.ShapeDtypeStruct((sizes[0], single), jnp.int32),
        tuple(jax.ShapeDtypeStruct((sizes[0], m), jnp.int32) for m in sizes[1:]),
    )


def finished(model: MultiTaskEstimator, module: nnx.Module, row: Any) -> dict[str, jax.Array]:
    """The outputs of a row by name of the task."""
    made = module(jax.tree.map(lambda x: x[None], row))
    return {name: outputs_of(task, made[name])[0] for name, task in model.tasks_.items()}


def outputs_of(task: Task, outputs: Float[Array, "b q"]) -> Float[Array, "..."]:
    """The probabilities of classes, or the means of numbers or counts."""
    match task:
        case Classification(size=1):
            return jnp.concatenate([jax.nn.sigmoid(-outputs), jax.nn.sigmoid(outputs)], axis=1)
        case Classification():
            return jax.nn.softmax(outputs)
        case Count():
            return task.mean * jnp.exp(outputs[:, 0])
        case Regression():
            return task.mean + task.std * outputs[:, 0]
    raise UsageError(f"task {task.name!r}: {type(task).__name__} has no form for other programs")


def tasks_of(model: MultiTaskEstimator) -> dict[str, dict[str, Any]]:
    """The classes of each classification, in the order of its outputs."""
    return {
        name: {"classes": to_json(f"task {name!r}", as_list(task.classes))}
        if isinstance(task, Classification)
        else {}
        for name, task in model.tasks_.items()
    }


def example_row(encoder: TableEncoder) -> dict[Any, Any]:
    """A row, with the first category of each column."""
    means = iter(encoder.scaler.mean_.tolist() if encoder.num_numbers else [])
    row = {}
    for i, name in enumerate(encoder.names):
        if i not in encoder.vocabulary_of:
            row[name] = next(means)
            continue
        categories = encoder.vocabularies[encoder.vocabulary_of[i]].categories
        first = categories[0] if categories else None
        row[name] = [first] if i in encoder.lists else first
    return row


def write_onnx(path: str | Path, model: MultiTaskEstimator) -> None:
    """Writes a fitted model as ONNX.

    Each column is an input (b,) by its name: float64 for numbers, string or int64 for categories.
    Missing and unknown categories are any others, such as "". The metadata have ``tasks``, the
    same JSON as in encoder.json.

    Args:
        path: a new file.

    Raises:
        UsageError: a package of the conversion is missing, or ONNX has no operators for a column.
    """
    path = Path(path)
    check_installed()
    check_is_fitted(model, "model_")
    if path.exists():
        raise UsageError(f"{path}: it exists; use another file")
    columns, tasks = list(map(str, model._encoder.names)), list(model.tasks_)
    if twice := repeated([*columns, *tasks]):
        raise UsageError(f"{twice!r} names two columns or tasks, and ONNX has one name: rename one")
    if "" in [*columns, *tasks]:
        raise UsageError("'' is the name of a column or a task, and ONNX has none: rename it")
    import onnx

    module: Any = model.model_
    network = convert(
        lambda row: tuple(finished(model, without_inputs(module), row).values()),
        "rows",
        (module.inputs.width,),
        [f"output {i}" for i in range(len(tasks))],
    )
    inner = "inner"
    while any(name.startswith(inner) for name in (*columns, *tasks)):
        inner += "_"
    network = onnx.compose.add_prefix(network, f"{inner} network/")
    encoder = encoder_proto(model._encoder, module, network.ir_version, inner)
    proto = onnx.compose.merge_models(
        encoder, network, io_map=[(encoder.graph.output[0].name, network.graph.input[0].name)]
    )
    for output, task in zip(proto.graph.output, tasks, strict=True):
        proto.graph.node.append(onnx.helper.make_node("Identity", [output.name], [task]))
        output.name = task
    onnx.helper.set_model_props(proto, {"tasks": json.dumps(tasks_of(model))})
    with writing(path), atomic(path) as temporary:
        onnx.save_model(proto, temporary)


def without_inputs(module: Any) -> Any:
    """The model from the rows that its module of inputs makes."""
    rows = nnx.clone(module)
    rows.inputs = None
    return rows


def encoder_proto(encoder: TableEncoder, module: Any, ir_version: int, inner: str) -> "ModelProto":
    """ONNX of columns to the rows f[b d] that ``TableRows`` makes.

    Args:
        inner: what all names but those of the columns begin with.
    """
    from onnx import TensorProto, helper, numpy_helper

    nodes, inputs = [], []
    parts: dict[str, list[str]] = {f"{inner} numbers": []} if encoder.num_numbers else {}
    arrays = {f"{inner} axis": np.array([1])}
    numbers = 0
    for i, column in enumerate(map(str, encoder.names)):
        name = f"{inner} column {i}"
        if i in encoder.vocabulary_of:
            vocabulary = encoder.vocabularies[encoder.vocabulary_of[i]]
            keys, kind = keys_of(column, vocabulary, i in encoder.lists)
            nodes.append(label_encoder(column, f"{name}/code", keys, kind, vocabulary.first))
            elem = TensorProto.STRING if kind == "strings" else TensorProto.INT64
            parts.setdefault(f"{inner} matrix {vocabulary.matrix}", []).append(f"{name}/code")
        else:
            elem = TensorProto.DOUBLE
            arrays[f"{name}/mean"] = encoder.scaler.mean_[numbers]
            arrays[f"{name}/scale"] = encoder.scaler.scale_[numbers]
            numbers += 1
            nodes += [
                helper.make_node("Sub", [column, f"{name}/mean"], [f"{name}/centered"]),
                helper.make_node("Div", [f"{name}/centered", f"{name}/scale"], [f"{name}/scaled"]),
                helper.make_node("Cast", [f"{name}/scaled"], [f"{name}/f32"], to=TensorProto.FLOAT),
            ]
            parts[f"{inner} numbers"].append(f"{name}/f32")
        inputs.append(helper.make_tensor_value_info(column, elem, ["b"]))
    for part, names in parts.items():
        columns = [f"{each}/column" for each in names]
        for each, column in zip(names, columns, strict=True):
            nodes.append(helper.make_node("Unsqueeze", [each, f"{inner} axis"], [column]))
        nodes.append(helper.make_node("Concat", columns, [f"{part}/columns"], axis=1))
    made = [f"{inner} numbers/columns"] if numbers else []
    for matrix, vectors in enumerate(module.inputs.vectors):
        part = f"{inner} matrix {matrix}"
        arrays[part] = np.asarray(vectors.embedding[...])
        nodes.append(helper.make_node("Gather", [part, f"{part}/columns"], [f"{part}/rows"]))
        made.append(f"{part}/flat")
        nodes.append(helper.make_node("Flatten", [f"{part}/rows"], [made[-1]], axis=1))
    nodes.append(helper.make_node("Concat", made, [f"{inner} rows"], axis=1))
    width = module.inputs.width
    rows = helper.make_tensor_value_info(f"{inner} rows", TensorProto.FLOAT, ["b", width])
    graph = helper.make_graph(
        nodes,
        "encoder",
        inputs,
        [rows],
        [numpy_helper.from_array(np.asarray(each), name) for name, each in arrays.items()],
    )
    versions = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=versions, ir_version=ir_version)


def label_encoder(column: str, codes: str, keys: list[Any], kind: str, first: int) -> "NodeProto":
    """The node that makes codes of a column of categories."""
    from onnx import helper

    values = list(range(first, first + len(keys)))
    return helper.make_node(
        "LabelEncoder",
        [column],
        [codes],
        domain="ai.onnx.ml",
        values_int64s=values,
        default_int64=first + len(keys),
        **{f"keys_{kind}": keys},
    )


def keys_of(name: str, vocabulary: Vocabulary, lists: bool) -> tuple[list[Any], str]:
    """The keys of ONNX's ``LabelEncoder`` for the categories of a column, and their type.

    Raises:
        UsageError: the operator cannot encode such a column.
    """
    keys = list(vocabulary.categories)
    if not lists and not vocabulary.buckets:
        if vocabulary.type == "str":
            return keys, "strings"
        if vocabulary.type == "number" and all(
            float(each).is_integer() and abs(each) < 2**63 for each in keys
        ):
            return list(map(int, keys)), "int64s"
    kind = "lists" if lists else "a hash" if vocabulary.buckets else f"type {vocabulary.type}"
    raise UsageError(
        f"column {name!r}: ONNX has no categories of {kind}: use strings or integers, or "
        "write_program"
    )
