"""Arrays in NumPy's .npz files, without trusting what they declare."""

import re
import struct
import zipfile
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np

from vmoe.checkpoints.arrays import ArrayFile, ArrayInfo, array_info, corrupt
from vmoe.errors import Failure, UsageError
from vmoe.host.retry import open_retried

MAX_RATIO = 100  # uncompressed to compressed bytes; weights hardly compress
SUFFIX = ".npy"  # suffix of arrays in the archive; NumPy writes no other members
COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # NumPy's; others can take any memory
LENGTHS = {(1, 0): "<H", (2, 0): "<I"}  # of a header, by version
MAX_HEADER = 10_000  # bytes
NUMBER = r"(?:0|[1-9]\d{0,17})"
HEADER = re.compile(  # of a plain array; NumPy's own parser evaluates any Python literal
    r"\{'descr': '([<>|=]?[biufcmMOSUV]\d{0,6})', 'fortran_order': (?:True|False), "
    rf"'shape': \(((?:{NUMBER}, ?)*(?:{NUMBER})?)\), ?\}}\s*",
    re.ASCII,
)
WRONG = (
    *(ValueError, TypeError, KeyError, EOFError, NotImplementedError, RuntimeError, OverflowError),
    *(struct.error, zipfile.BadZipFile, zlib.error),
)


def read(path: str | Path) -> ArrayFile:
    """The arrays of a .npz file.

    bfloat16 arrays, which NumPy stores as raw pairs of bytes, are bfloat16 again.

    Raises:
        UsageError: the file holds Python objects.
        Failure: the file is missing or corrupt, or declares absurd sizes.
    """
    path = Path(path)
    try:
        with open_retried(path) as file, zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            if others := [each.filename for each in members if not each.filename.endswith(SUFFIX)]:
                raise corrupt(
                    path, f"{others[0]!r:.80} is not an array: its name must end in {SUFFIX}"
                )
            if len({each.header_offset for each in members}) < len(members):
                raise corrupt(path, "two arrays start at the same byte")
            declared = sum(each.file_size for each in members)
            if declared > MAX_RATIO * path.stat().st_size:
                raise corrupt(path, f"it declares {declared:,} bytes")
            infos = {_name(each): _info(path, archive, each) for each in members}
            if len(infos) < len(members):
                raise corrupt(path, "two arrays have one name")
    except OSError as error:
        raise Failure(f"{path}: {error.strerror or error}") from None
    except WRONG as error:
        raise corrupt(path, error) from None

    def arrays(names: Collection[str]) -> Iterator[tuple[str, np.ndarray]]:
        with open_retried(path) as file, zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if _name(member) in names:
                    yield _name(member), _array(path, archive, member, infos[_name(member)])

    return ArrayFile(path, infos, arrays)


def _name(member: zipfile.ZipInfo) -> str:
    return member.filename.removesuffix(SUFFIX)


def _info(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> ArrayInfo:
    if member.compress_type not in COMPRESSIONS:
        raise ValueError(f"{_name(member)} is compressed by method {member.compress_type}")
    with archive.open(member) as file:
        code = LENGTHS[np.lib.format.read_magic(file)]
        size = struct.unpack(code, file.read(struct.calcsize(code)))[0]
        header = file.read(min(size, MAX_HEADER)).decode("latin1")
        found = HEADER.fullmatch(header)
        if found is None:
            raise ValueError(f"{_name(member)} has the header {header!r:.80}")
        dtype = np.dtype(found[1])
        shape = tuple(int(n) for n in found[2].split(",") if n.strip())
        if dtype.hasobject:
            raise UsageError(
                f"{path}: {_name(member)} holds Python objects, which are not read because that "
                "can run code; save plain arrays with np.savez"
            )
        info = array_info(shape, "bfloat16" if dtype.str == "|V2" else dtype.name)
        if file.tell() + info.nbytes != member.file_size:
            raise ValueError(f"{_name(member)} has shape {shape} and {member.file_size:,} bytes")
        return info


def _array(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo, info: ArrayInfo
) -> np.ndarray:
    try:
        with archive.open(member) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read(1)  # checks the CRC of the file's end
    except (OSError, *WRONG) as error:
        raise corrupt(path, f"{_name(member)}: {error}") from None
    return array.view(info.dtype) if array.dtype.str == "|V2" else array
