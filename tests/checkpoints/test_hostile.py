"""Hostile files of trained models: reading one gives a model, or an error of one line."""

import functools
import json
import pickle
import random
import struct
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest

from tests.hostility import fuzz
from vmoe.checkpoints import chunked, read
from vmoe.errors import Failure, UsageError, VmoeError

SAMPLES = {sample.name: sample for sample in fuzz.samples()}
# Files of each format; python -m tests.hostility fuzz makes more.
MUTANTS = [range(50), pytest.param(range(50, 150), marks=pytest.mark.slow)]


@pytest.mark.parametrize("mutants", MUTANTS, ids=["50", "100 more"])
@pytest.mark.parametrize("name", SAMPLES)
def test_a_changed_file_is_refused_in_one_line_or_read(
    name: str, mutants: range, tmp_path: Path
) -> None:
    folder = fuzz.write(SAMPLES[name], tmp_path / "model")
    outcomes: Counter[str] = Counter()
    for i in mutants:
        case = fuzz.mutant(SAMPLES[name], random.Random(f"tests {i}"))
        outcome, reason = fuzz.check(case, folder)
        assert outcome != "crash", f"{i}, {case.operations}: {reason}"
        outcomes[outcome] += 1
    assert outcomes["refused"] > len(mutants) / 3, outcomes
    hashed = name.startswith("vmoe")  # almost every change of such a file is seen
    assert outcomes["read"] or hashed, outcomes


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A good model in the format of the test's parameter."""
    sample = SAMPLES[request.param]
    return fuzz.write(sample, tmp_path / "model") / sample.path


def of(name: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("model", [name], indirect=True, ids=[name])


def refusal(path: Path) -> str:
    with pytest.raises(VmoeError) as caught:
        read(path)
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1_200
    return message


def npy(header: str, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode() + content


def plain(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"


def archive(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)
    return path


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    n = 1 << 24
    content = npy(plain(f"({n // 4},)"), bytes(n))
    path = archive(tmp_path / "x.npz", zipfile.ZIP_DEFLATED, cls=content)
    tracemalloc.start()
    try:
        assert "it declares 16," in refusal(path)
        assert tracemalloc.get_traced_memory()[1] < n / 4
    finally:
        tracemalloc.stop()


def test_overlapping_zip_entries_are_refused(tmp_path: Path) -> None:
    """Every entry has the data of one, as in a zip bomb without nesting."""
    one = npy(plain("(1,)"), bytes(4))
    path = archive(tmp_path / "x.npz", **{f"a{i}": one for i in range(3)})
    content = bytearray(path.read_bytes())
    for place in fuzz.positions(bytes(content), b"PK\1\2"):
        content[place + 42 : place + 46] = bytes(4)
    path.write_bytes(content)
    assert "corrupt (two arrays start at the same byte)" in refusal(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_that_numpy_does_not_write_is_refused(method: int, tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", method, cls=npy(plain("(1,)"), bytes(4)))
    assert f"cls is compressed by method {method}" in refusal(path)


class Trap:
    """Its pickle writes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_a_pickled_object_array_is_refused_and_not_run(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, cls=np.array([Trap(tmp_path / "run")], dtype=object))
    assert "cls holds Python objects, which are not read because that can run" in refusal(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", ["pth", "pt", "bin", "ckpt", "pkl"])
def test_a_pickle_is_refused_with_the_remedy_and_not_run(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(Trap(tmp_path / "run")))
    assert "convert it: torch.load(FILE, weights_only=True), then safetensors" in refusal(path)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "header",
    [
        plain("-" * 8_000 + "1"),
        plain("(" * 8_000),
        plain("(3L, 2L)"),
        plain("(__import__('os').getpid(),)"),
        plain("(True,)"),
        plain("(4,)", "[('a', '|O')]"),
        plain("(4,)", "'(1000000000,)f4'"),
        plain("(99999999999999999999,)"),
        plain("(4,)").replace("'shape'", "'shape': (1,), 'shape'"),
        "x" * 60_000,
    ],
    ids=range(10),
)
def test_a_header_of_npy_that_is_not_of_a_plain_array_is_refused(
    header: str, tmp_path: Path
) -> None:
    path = archive(tmp_path / "x.npz", cls=npy(header, bytes(16)))
    assert "corrupt (cls has the header" in refusal(path)


def test_a_header_that_declares_more_than_its_file_is_refused(tmp_path: Path) -> None:
    path = archive(tmp_path / "x.npz", cls=npy(plain("(1000, 1000)"), bytes(16)))
    assert "cls has shape (1000, 1000) and" in refusal(path)


def test_two_arrays_of_one_name_are_refused_in_npz(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("cls.npy", npy(plain("(1,)"), bytes(4)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            file.writestr("cls.npy", npy(plain("(1,)"), bytes(4)))
    assert "two arrays have one name" in refusal(tmp_path / "x.npz")


def test_a_member_without_the_suffix_is_refused(tmp_path: Path) -> None:
    """``x`` and ``x.npy`` are two members; only the second is an array."""
    good = npy(plain("(1,)"), np.ones(1, np.float32).tobytes())
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("cls", npy(plain("(1000000000000,)")))
        file.writestr("cls.npy", good)
    assert "'cls' is not an array: its name must end in .npy" in refusal(tmp_path / "x.npz")


@of("npz")
def test_a_changed_letter_of_a_name_in_npz_is_refused(model: Path) -> None:
    """The change is in the directory of the archive, for which zip has no checksum."""
    content = model.read_bytes()
    start = int.from_bytes(content[-6:-2], "little")
    suffixes = [place for place in fuzz.positions(content, b".npy") if place > start]
    for place in (place + i for place in suffixes for i in (-1, 0, 3)):
        changed = bytearray(content)
        changed[place] ^= 1
        model.write_bytes(changed)
        assert "model.npz: corrupt (" in refusal(model)


@pytest.mark.parametrize("shape", ["(1000000000000, 0)", "(100000, 1)", "()"])
def test_stacked_blocks_are_not_enumerated_before_they_are_counted(
    shape: str, tmp_path: Path
) -> None:
    size = {"(100000, 1)": 400_000, "()": 4}.get(shape, 0)
    content = npy(plain(shape), bytes(size))
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as file:
        file.writestr("Transformer/encoderblock/LayerNorm_0/scale.npy", content)
    assert "at most 256 blocks can be stacked" in refusal(tmp_path / "x.npz")


@of("npz")
def test_a_block_of_absurd_number_is_refused(model: Path) -> None:
    """Its number was the number of blocks to look for."""
    members = fuzz.members_of(model.read_bytes())
    with zipfile.ZipFile(model, "w") as file:
        for name, content in members.items():
            file.writestr(name.replace("encoderblock_1/", f"encoderblock_{'9' * 12}/"), content)
    assert "block 1 of 2 has no parameters" in refusal(model)


@of("published")
def test_nested_lengths_of_msgpack_allocate_nothing(model: Path) -> None:
    """Each of a thousand nested arrays declares as many elements as the file has bytes."""
    size = 1 << 20
    nested = (b"\xdd" + struct.pack(">I", size)) * 1_000
    entry = msgpack.ExtType(chunked.INDEX, nested + bytes(size))
    index = {"version": chunked.VERSION, "shard_count": 1, "index": {"a": entry}}
    tracemalloc.start()
    try:
        for content in (msgpack.packb(index), nested + bytes(size), b"\x83" + nested + bytes(size)):
            Path(f"{model}.index").write_bytes(content)
            assert "ckpt.index: corrupt" in refusal(model)
        assert tracemalloc.get_traced_memory()[1] < 20 * size
    finally:
        tracemalloc.stop()


@of("published")
def test_nested_lengths_in_a_data_file_allocate_nothing(model: Path) -> None:
    path = Path(f"{model}.data-00000-of-00003")
    nested = (b"\xdd" + struct.pack(">I", 1 << 17)) * 1_000
    path.write_bytes(b"\x81\xa10" + nested + bytes(1 << 17))
    tracemalloc.start()
    try:
        assert f"{path.name}: corrupt" in refusal(model)
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def with_header(path: Path, change: Any) -> None:
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    text = change(header)
    text = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + size :])


LIES = {
    "shape": lambda header: header["cls_token"].update(shape=[1, 1, 1 << 40]),
    "no elements": lambda header: header["cls_token"].update(shape=[1 << 40, 0]),
    "overflow": lambda header: header["cls_token"].update(shape=[1 << 33, 1 << 33]),
    "offsets": lambda header: header["cls_token"].update(data_offsets=[0, 1 << 60]),
    "overlap": lambda h: h["cls_token"].update(data_offsets=h["pos_embed"]["data_offsets"]),
    "dtype": lambda header: header["cls_token"].update(dtype="F8_E4M3"),
    "nesting": lambda header: "[" * 100_000,
    "no object": lambda header: "[]",
    "a name": lambda header: header.update({"x" * 10**6: header.pop("cls_token")}),
    "a line": lambda header: header.update({"a\nb": header.pop("cls_token")}),
}


@of("timm")
@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_header_that_lies_is_refused(lie: str, model: Path) -> None:
    with_header(model / "model.safetensors", LIES[lie])
    assert "model.safetensors: " in refusal(model)


@of("timm")
def test_the_length_of_a_safetensors_header_is_bounded_by_the_file(model: Path) -> None:
    for length in (0, 1 << 20, 1 << 62, (1 << 64) - 1):
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(struct.pack("<Q", length) + content[8:])
        assert "model.safetensors: corrupt" in refusal(model)


@of("hugging_face, split")
@pytest.mark.parametrize(
    "file", ["../x.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "\0", "config.json", 5]
)
def test_an_index_that_names_a_file_elsewhere_is_refused(file: Any, model: Path) -> None:
    path = model / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"] |= dict.fromkeys(index["weight_map"], file)
    path.write_text(json.dumps(index))
    (model.parent / "x.safetensors").write_bytes(
        (model / "model-00001-of-00002.safetensors").read_bytes()
    )
    assert "model.safetensors.index.json: corrupt" in refusal(model)


@of("vmoe, split")
def test_every_file_of_our_format_needs_its_sha256(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    for name in list(config["sha256"]):
        sums = {key: each for key, each in config["sha256"].items() if key != name}
        (model / "config.json").write_text(json.dumps(config | {"sha256": sums}))
        assert f"it has no '{name}'" in refusal(model)


@of("vmoe")
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("depth", 10**9), ("width", 10**30), ("num_classes", 10**9), ("mlp_dim", 1 << 62)),
        *(("num_heads", 0), ("patch_size", 10**9), ("image_size", 10**400), ("depth", "4")),
    ],
)
def test_sizes_in_our_config_are_compared_with_the_arrays_first(
    field: str, value: Any, model: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["model"][field] = value
    (model / "config.json").write_text(json.dumps(config, default=str))
    assert "config.json: corrupt (" in refusal(model)


WRONG: list[Any] = [
    *(None, True, -1, 0, 10**400, float("nan"), "", "\ud800\n", [], {}, [[]], [10**400] * 3),
    *([0, 0, 0], {"height": float("inf")}, "vit_" + "_clip_" * 20_000),
]


IMAGES = "preprocessor_config.json"
READ = {  # the fields that a reader takes from the JSON files of a format
    "timm": [
        *("architecture", "model_args", "model_args.num_heads", "global_pool", "label_names"),
        *("pretrained_cfg", "pretrained_cfg.mean", "pretrained_cfg.std", "pretrained_cfg.crop_pct"),
        *("pretrained_cfg.crop_mode", "pretrained_cfg.interpolation"),
    ],
    "hugging_face": [
        *("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "pooler_act"),
        *("id2label", "id2label.0"),
    ],
    f"hugging_face {IMAGES}": ["image_mean", "image_std", "size", "size.height", "resample"],
    "vmoe": [
        *("format", "version", "model", "model.moe", "class_names", "preprocessing", "step"),
        *("preprocessing.resize_to", "origin", "origin.weights", "sha256", "model.sparse_blocks"),
    ],
}


@pytest.mark.parametrize("name", READ)
def test_a_wrong_value_in_a_config_is_one_line_or_a_model(name: str, tmp_path: Path) -> None:
    format_, _, file = name.partition(" ")
    model = fuzz.write(SAMPLES[format_], tmp_path / "model")
    path = model / (file or "config.json")
    text = path.read_text()
    for place in READ[name]:
        for wrong in WRONG:
            content = json.loads(text)
            *parents, last = place.split(".")
            functools.reduce(dict.__getitem__, parents, content)[last] = wrong
            path.write_text(json.dumps(content))
            try:
                read(model)
            except (UsageError, Failure) as error:
                assert str(error).isprintable() and len(str(error)) < 1_200


@pytest.mark.parametrize("model", ["timm", "hugging_face"], indirect=True)
@pytest.mark.parametrize(
    "text", ["", "[]", "{", "[" * 100_000, '{"a":' * 100_000, "9" * 5_000, "\0"]
)
def test_a_config_that_is_no_json_object_is_refused(text: str, model: Path) -> None:
    (model / "config.json").write_text(text)
    assert "config.json: corrupt" in refusal(model)


@pytest.mark.parametrize("model", sorted(SAMPLES), indirect=True)
def test_a_file_that_is_cut_anywhere_is_refused(model: Path) -> None:
    folder = model if model.is_dir() else model.parent
    for path in sorted(folder.iterdir()):
        content = path.read_bytes().rstrip(b"\n")
        for keep in (0, 1, 7, 9, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:keep])
            assert "corrupt" in refusal(model), (path.name, keep)
        path.write_bytes(content)
