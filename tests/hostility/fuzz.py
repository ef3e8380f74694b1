"""Attack the readers of trained models with broken and hostile files, and count the crashes.

    python -m tests.hostility fuzz [--mutants 100000] [--seed 0]

Small good files of every format are changed at random: bits, lengths, ranges; values of JSON, of
msgpack and of the headers of .npy and .safetensors; entries of zip archives.
``vmoe.checkpoints.read`` reads each mutant in a process of limited memory (512 MB more than at
first) and 10 s of computing. It must raise a VmoeError of one line or return a model, without a
warning. For a model in our format whose checksummed files have changed it must raise an error.
Anything else is a crash, printed with the number n of the mutant: ``mutant(sample,
random.Random(f"{seed} {n}"))`` makes it again.

Prints a row per format; the exit status is 0 if there was no crash, else 1.
"""

import argparse
import collections
import contextlib
import dataclasses
import io
import json
import multiprocessing.pool
import os
import random
import resource
import shutil
import signal
import struct
import tempfile
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
from rich.console import Console
from rich.table import Table

from tests.command import ROOT
from vmoe.checkpoints import read, vmoe_format
from vmoe.errors import VmoeError

GOLDEN = ROOT / "tests" / "golden"
MEMORY = 512 << 20  # bytes that a read may take
SECONDS = 10.0  # that a read may compute, whatever else the machine does
LONGEST = 2_000  # maximum number of characters of a message
HUGE = (0, 1, 127, 255, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 1 << 40, (1 << 63) - 1)
NAMES = ("../x", "/etc/passwd", "a/b", "..", "", "\0", "\n", "\ud800", "x" * 5_000, "blocks/0/é")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Good files.

    Attributes:
        name: the name of the format.
        files: the content of the files by name.
        path: the path to read, relative to the folder of the files.
        sealed: the files that have a checksum.
    """

    name: str
    files: dict[str, bytes]
    path: str
    sealed: frozenset[str] = frozenset()


class Mutant(NamedTuple):
    """Changed files of a sample: new content by name, None for a file that is missing."""

    sample: Sample
    changes: dict[str, bytes | None]
    operations: str


def samples() -> list[Sample]:
    """A small model in each format."""
    published, weights = GOLDEN / "published", GOLDEN / "weights"
    found = [
        _sample("published", published / "sharded", "ckpt"),
        _sample("published, in pieces", published / "pieces", "ckpt"),
        _sample("npz", weights / "augreg", "model.npz"),
        _sample("npz, scanned", weights / "big_vision_scanned", "model.npz"),
        _sample("timm", weights / "timm_layer_scale", "."),
        _sample("hugging_face", weights / "hf_vit", "."),
        _sample("hugging_face, split", weights / "hf_vit_shards", "."),
    ]
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stderr(io.StringIO()):
        stored = read(published / "sharded" / "ckpt")
        for label, size in (("vmoe", vmoe_format.SHARD), ("vmoe, split", 40_000)):
            target = Path(name) / label
            vmoe_format.write(target, stored, shard_bytes=size)
            (target / vmoe_format.CARD).unlink()  # for people only
            sealed = frozenset(path.name for path in target.iterdir()) - {vmoe_format.CONFIG}
            found.append(_sample(label, target, ".", sealed))
    return found


def _sample(name: str, folder: Path, path: str, sealed: frozenset[str] = frozenset()) -> Sample:
    files = {file.name: file.read_bytes() for file in sorted(folder.iterdir())}
    files.pop("expected.npz", None)
    files.pop("resized.npz", None)
    return Sample(name, files, path, sealed)


def mutant(sample: Sample, rng: random.Random) -> Mutant:
    """A sample with one to three changes of one file, or without one of its files."""
    name = rng.choice(list(sample.files))
    if rng.random() < 0.005:
        return Mutant(sample, {name: None}, f"{name} removed")
    content, operations = sample.files[name], []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        operation = rng.choice(_operations_for(name))
        operations.append(operation.__name__)
        with contextlib.suppress(Exception):  # an earlier change left nothing to parse
            content = operation(content, rng)
    return Mutant(sample, {name: content}, f"{name}: {', '.join(operations)}")


Operation = Callable[[bytes, random.Random], bytes]


def _operations_for(name: str) -> list[Operation]:
    if name.endswith(".json"):
        return [*ANY, *[change_json] * 3 * len(ANY)]
    if name.endswith(".safetensors"):
        return [*ANY, *[change_safetensors] * len(ANY)]
    if name.endswith(".npz"):
        return [*ANY, *ZIP * 3]
    return [*ANY, *[change_msgpack] * 2 * len(ANY)]


def _place(content: bytes, rng: random.Random) -> int:
    """An offset, most often near the start or the end, where the structure is."""
    size = len(content)
    near = rng.choice((16, 400, 4_000, size, size))
    i = rng.randrange(max(1, min(near, size)))
    return i if rng.random() < 0.6 else max(0, size - 1 - i)


def flip_bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def truncate(content: bytes, rng: random.Random) -> bytes:
    return content[: _place(content, rng)]


def insert(content: bytes, rng: random.Random) -> bytes:
    i = _place(content, rng)
    return content[:i] + rng.randbytes(rng.choice((1, 2, 8, 300))) + content[i:]


def delete(content: bytes, rng: random.Random) -> bytes:
    i = _place(content, rng)
    return content[:i] + content[i + rng.choice((1, 2, 8, 300)) :]


def duplicate(content: bytes, rng: random.Random) -> bytes:
    i, size = _place(content, rng), rng.choice((1, 4, 50, 2_000))
    return content[: i + size] + content[i : i + size] + content[i + size :]


def blank(content: bytes, rng: random.Random) -> bytes:
    i, size = _place(content, rng), rng.choice((1, 4, 50, 2_000))
    piece = rng.choice((b"\0", b"\xff", b" ", b"[", b"(")) * len(content[i : i + size])
    return content[:i] + piece + content[i + size :]


def overwrite_integer(content: bytes, rng: random.Random) -> bytes:
    i, code = _place(content, rng), rng.choice(("<H", "<I", "<Q", ">H", ">I", ">Q"))
    size = struct.calcsize(code)
    return content[:i] + struct.pack(code, rng.choice(HUGE)) + content[i + size :]


def swap(content: bytes, rng: random.Random) -> bytes:
    size = rng.choice((1, 4, 8, 60))
    i, j = sorted((_place(content, rng), _place(content, rng)))
    j = max(j, i + size)
    return (
        content[:i] + content[j : j + size] + content[i + size : j]
        + content[i : i + size] + content[j + size :]
    )  # fmt: skip


ANY: list[Operation] = [
    *(flip_bits, truncate, insert, delete, duplicate, blank, overwrite_integer, swap),
]


class _Raw(str):
    """JSON text that json.dumps cannot make."""


def _hostile(rng: random.Random, value: Any) -> Any:
    """A value of another type, or an extreme value of the same type."""
    number = rng.choice((*HUGE, -1, 1 << 64, 10**30, 10**400, 3, 5, 7))
    other: list[Any] = [
        *(None, True, False, number, -number, float("nan"), float("inf"), 1e308, 1e-320, 0.5),
        *("", "1", "x" * 100_000, {}, [], [value], {"a": value}, [value] * 3, [[]], [{}]),
        *(rng.choice(NAMES), {"": value}, [number] * 2, [0, 0, 0], [float("nan")] * 3),
    ]
    if type(value) is int:
        other += [value + 1, value - 1, value * 2, -value, number, number] * 2
    if isinstance(value, str):
        other += [value + "x", value[1:], value * 2, value.upper(), *NAMES]
    if isinstance(value, list):
        other += [value[1:], value * 2, value[::-1], [*value, 1]]
    return rng.choice(other)


def _edited(tree: Any, rng: random.Random) -> Any:
    """A tree of dicts and lists with one change in a random place."""
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return _hostile(rng, tree)
    keys = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = rng.choice(list(keys))
    copy: Any = tree.copy()
    match rng.randrange(8):
        case 0:
            del copy[key]
        case 1 if isinstance(copy, dict):
            copy[rng.choice((*NAMES, f"{key}x", f"{key}"[1:]))] = copy.pop(key)
        case 2:
            other = rng.choice(list(keys))
            copy[key], copy[other] = copy[other], copy[key]
        case _:
            copy[key] = _edited(copy[key], rng)
    return copy


def _json_text(tree: Any, rng: random.Random) -> str:
    text = json.dumps(tree)
    match rng.randrange(12):
        case 0:  # nesting deeper than any parser follows
            depth = rng.choice((50, 500, 5_000, 100_000))
            bracket = rng.choice(("[]", '{"a":}'))
            nested = bracket[:-1] * depth + "0" + bracket[-1] * depth
            return text.replace(rng.choice(("true", "null", "16", "0.5", '"F32"')), nested, 1)
        case 1:  # the first key twice
            return text.replace("{", "{" + text[1 : text.find(",")] + ",", 1)
        case 2:
            return text.replace(rng.choice(("16", "10", "2", "4")), "9" * 6_000, 1)
    return text


def change_json(content: bytes, rng: random.Random) -> bytes:
    """Changes a value, a key or the nesting of a JSON file."""
    return _json_text(_edited(json.loads(content), rng), rng).encode(errors="surrogatepass")


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    """Changes the header, and most often also its length."""
    size = int.from_bytes(content[:8], "little")
    header, arrays = content[8 : 8 + size], content[8 + size :]
    header = change_json(header, rng)
    size = len(header) if rng.random() < 0.9 else rng.choice(HUGE)
    return struct.pack("<Q", size) + header + arrays


def change_msgpack(content: bytes, rng: random.Random) -> bytes:
    """Changes a value, a key or the nesting of a msgpack object, also inside its extensions."""
    tree = msgpack.unpackb(content, strict_map_key=False)
    return _pack(_edited_msgpack(tree, rng), rng)


def _edited_msgpack(tree: Any, rng: random.Random) -> Any:
    if isinstance(tree, msgpack.ExtType):
        if rng.random() < 0.2:
            code = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, 8, 127, -1))
            return msgpack.ExtType(code, tree.data) if code >= 0 else msgpack.Timestamp(1, 1)
        return msgpack.ExtType(tree.code, _edited_payload(tree.data, rng))
    if isinstance(tree, bytes) and rng.random() < 0.7:
        return _edited_payload(tree, rng)
    if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
        return _edited(tree, rng)
    keys = list(tree) if isinstance(tree, dict) else list(range(len(tree)))
    key, copy = rng.choice(keys), tree.copy()
    copy[key] = _edited_msgpack(copy[key], rng)
    return copy


def _edited_payload(data: bytes, rng: random.Random) -> bytes:
    """Changes the object that is packed in bytes, or the bytes."""
    try:
        inner = msgpack.unpackb(data)
        return _pack(_edited_msgpack(inner, rng), rng)
    except Exception:  # these bytes are no msgpack
        return rng.choice(ANY)(data, rng)


def _pack(tree: Any, rng: random.Random) -> bytes:
    packed = msgpack.packb(tree, default=str, unicode_errors="surrogatepass")
    if rng.random() < 0.02:  # nesting deeper than any parser follows, each level of absurd length
        head = rng.choice((b"\x91", b"\x81\xa1a", b"\xdd\x00\x00\x40\x00", b"\xdd\xff\xff\xff\xff"))
        return packed[:-1] + head * rng.choice((100, 1_000, 10_000)) + b"\0"
    return packed


def members_of(content: bytes) -> dict[str, bytes]:
    """The members of a zip archive by name."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {each.filename: archive.read(each) for each in archive.infolist()}


def _archive(members: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    kinds = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", rng.choice(kinds)) as archive:
        warnings.simplefilter("ignore")  # two members of one name
        for name, content in members:
            archive.writestr(name.encode("utf-8", "replace").decode(), content)
    return file.getvalue()


def change_member(content: bytes, rng: random.Random) -> bytes:
    """Changes a .npy file, its name, or adds another of the same name."""
    members = list(members_of(content).items())
    i = rng.randrange(len(members))
    name, array = members[i]
    match rng.randrange(7):
        case 0:
            members[i] = (rng.choice((*NAMES, name[1:], name.removesuffix(".npy"))), array)
        case 1:
            members.append((name, array))
        case 2:
            members.append((name.removesuffix(".npy"), array))
        case 3:
            del members[i]
        case _:
            members[i] = (name, rng.choice([*ANY, *[change_npy] * 10])(array, rng))
    return _archive(members, rng)


DTYPES = (
    *("<f4", ">f4", "<f8", "|O", "|V2", "|V4", "<c8", "<U9", "<M8[s]", "|b1", "<i8", "<f2"),
    *("f4,f4", "(1000000000,)f4", "a4", "O8", "x" * 200),
)


def change_npy(content: bytes, rng: random.Random) -> bytes:
    """Changes the header of a .npy file."""
    size = struct.unpack("<H", content[8:10])[0]
    header, array = content[10 : 10 + size].decode("latin1"), content[10 + size :]
    shape = header[header.index("(") : header.index(")") + 1]
    number = rng.choice((*HUGE, -1, 10**30))
    descr = header.split("'")[3]
    new = rng.choice(
        (
            header.replace(shape, rng.choice((f"({number},)", f"({number}, 0)", "()", "(0,)"))),
            header.replace(shape, f"({'1, ' * rng.choice((9, 33, 2_000))})"),
            header.replace(shape, rng.choice(("(" * 3_000, "-" * 8_000 + "1", "(3L, 2L)", "3"))),
            header.replace(shape, rng.choice(("(True,)", "(1.0,)", "[3]", "{}", "9" * 6_000))),
            header.replace(f"'{descr}'", rng.choice((*map(repr, DTYPES), "[('a', '|O')]", "None"))),
            header.replace("False", rng.choice(("True", "1", "None", "False, 'a': 1"))),
            header.strip() + "\n" * rng.choice((0, 1, 40_000)),
        )
    )
    version = rng.choice((b"\1\0", b"\1\0", b"\1\0", b"\2\0", b"\3\0", b"\0\0", b"\xff\xff"))
    code = "<H" if version == b"\1\0" and len(new) < 1 << 16 else "<I"
    return content[:6] + version + struct.pack(code, len(new)) + new.encode("latin1") + array


def change_directory(content: bytes, rng: random.Random) -> bytes:
    """Changes a field of an entry in the zip archive's directory, or of its end."""
    changed = bytearray(content)
    entries = positions(content, b"PK\1\2")
    i = rng.choice(entries)
    match rng.randrange(5):
        case 0:  # overlapping entries: all have the data of one
            offset = changed[i + 42 : i + 46]
            for other in entries:
                changed[other + 42 : other + 46] = offset
        case 1:
            other = rng.choice(positions(content, b"PK\1\2") + positions(content, b"PK\3\4"))
            changed[other + 8] ^= 1 << rng.randrange(8)  # flags: encrypted, UTF-8 ...
        case 2:
            place, code = rng.choice(((10, "<H"), (20, "<I"), (24, "<I"), (30, "<H"), (42, "<I")))
            value = rng.choice((*HUGE[:8], 8, 12, 14, 99)) % (1 << 8 * struct.calcsize(code))
            struct.pack_into(code, changed, i + place, value)
        case 3:
            end = content.rindex(b"PK\5\6")
            struct.pack_into("<I", changed, end + rng.choice((8, 12, 16)), rng.choice(HUGE[:8]))
        case _:  # sizes of 64 bits, in an extra field that is not there
            struct.pack_into("<III", changed, i + 20, *[0xFFFFFFFF] * 2, 0)
    return bytes(changed)


def positions(content: bytes, mark: bytes) -> list[int]:
    """The offset at which a mark begins."""
    places, i = [], content.find(mark)
    while i >= 0:
        places.append(i)
        i = content.find(mark, i + 1)
    return places


def bomb(content: bytes, rng: random.Random) -> bytes:
    """Replaces an array by zeros whose size is a thousand times the size of its file."""
    members = members_of(content)
    name = rng.choice(list(members))
    n = rng.choice((1 << 18, 1 << 20, 1 << 22))
    file = io.BytesIO()
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({n // 4},), }}".ljust(117) + "\n"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for each, array in members.items():
            start = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header.encode()
            archive.writestr(each, start + bytes(n) if each == name else array)
    return file.getvalue()


ZIP: list[Operation] = [*[change_member] * 4, *[change_directory] * 3, bomb]


def check(mutant: Mutant, folder: Path) -> tuple[str, str]:
    """Reads a mutant.

    Args:
        folder: has the files of the sample, which are restored afterwards.

    Returns:
        "refused" or "read", or "crash" with the reason.
    """
    try:
        for name, content in mutant.changes.items():
            (folder / name).unlink()
            if content is not None:
                (folder / name).write_bytes(content)
        with contextlib.redirect_stderr(io.StringIO()):
            read(folder / mutant.sample.path)
    except VmoeError as error:
        text = str(error)
        if text.isprintable() and len(text) <= LONGEST:
            return "refused", ""
        return "crash", f"a message of {len(text)} characters, not one line: {text!r:.300}"
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[-4:]
        places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
        return "crash", f"{type(error).__name__}: {str(error)!r:.200} in {', '.join(places)}"
    finally:
        for name in mutant.changes:
            (folder / name).write_bytes(mutant.sample.files[name])
    changed = {name for name in mutant.changes if mutant.changes[name] != mutant.sample.files[name]}
    if accepted := sorted(changed & mutant.sample.sealed):
        return "crash", f"{accepted[0]} has changed, and was read"
    return "read", ""


def write(sample: Sample, folder: Path) -> Path:
    """Writes the files of a sample into a new folder."""
    folder.mkdir()
    for name, content in sample.files.items():
        (folder / name).write_bytes(content)
    return folder


class Result(NamedTuple):
    """The report of a worker about a mutant."""

    number: int
    outcome: str
    reason: str
    memory: int  # bytes at the peak, minus the bytes before
    seconds: float


def _status(name: str) -> int:
    """A size of this process in bytes, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def work(seed: int, numbers: range, folder: Path, results: Connection) -> None:
    """Reads mutants in a separate process, which a crash may end."""
    own = samples()
    folders = [write(each, folder / str(i)) for i, each in enumerate(own)]
    for _ in range(2):  # so that modules loaded by the first read do not count
        for each, place in zip(own, folders, strict=True):
            check(Mutant(each, {}, ""), place)
    warnings.simplefilter("error")
    limit = _status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a library in Rust reports a panic there
    for number in numbers:
        which = number % len(own)
        case = mutant(own[which], random.Random(f"{seed} {number}"))
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before, begin = _status("VmRSS"), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        outcome, reason = check(case, folders[which])
        signal.setitimer(signal.ITIMER_PROF, 0)
        seconds = time.process_time() - begin
        reason = reason and f"{case.operations}: {reason}"
        results.send(Result(number, outcome, reason, _status("VmHWM") - before, seconds))


def attack(seed: int, numbers: range, folder: Path) -> Iterator[Result]:
    """Reads mutants in a worker, and starts a new worker when a mutant has ended one."""
    context = multiprocessing.get_context("spawn")
    while numbers:
        receiver, sender = context.Pipe(duplex=False)
        place = Path(tempfile.mkdtemp(dir=folder))
        process = context.Process(target=work, args=(seed, numbers, place, sender))
        process.start()
        sender.close()
        try:
            while numbers:
                result = receiver.recv()
                numbers = numbers[1:]
                yield result
        except EOFError:
            process.join()
            code = -(process.exitcode or 0)
            reason = f"{SECONDS:.0f} s of computing" if code == signal.SIGPROF else f"signal {code}"
            yield Result(numbers[0], "crash", f"the process ended: {reason}", 0, 0.0)
            numbers = numbers[1:]
        process.join()
        shutil.rmtree(place)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mutants", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)


def main(options: argparse.Namespace) -> int:
    names = [sample.name for sample in samples()]
    results: dict[str, list[Result]] = {name: [] for name in names}
    workers = os.cpu_count() or 1
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, multiprocessing.pool.ThreadPool(workers) as pool:
        shares = [range(i, options.mutants, workers) for i in range(workers)]

        def collect(share: range) -> None:
            for result in attack(options.seed, share, Path(folder)):
                name = names[result.number % len(names)]
                results[name].append(result)
                if result.outcome == "crash":
                    print(f"mutant {result.number}, {name}, {result.reason}", flush=True)

        pool.map(collect, shares)
    table = Table(
        *("format", "mutants", "refused", "read", "crashes", "most memory", "longest"),
        title=f"seed {options.seed}, {time.monotonic() - begin:.0f} s",
    )
    total: collections.Counter[str] = collections.Counter()
    for name, own in results.items():
        outcomes = collections.Counter(result.outcome for result in own)
        counts = [len(own), *(outcomes[each] for each in ("refused", "read", "crash"))]
        memory = max((result.memory for result in own), default=0)
        seconds = max((result.seconds for result in own), default=0.0)
        figures = [f"{memory / 1e6:.0f} MB", f"{seconds:.2f} s"]
        table.add_row(name, *(f"{count:,}" for count in counts), *figures)
        total += outcomes
    Console().print(table)
    return 1 if total["crash"] else 0
