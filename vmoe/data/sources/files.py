"""A source that reads image files when they are needed."""

import contextlib
import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vmoe.data.decode import read_bytes
from vmoe.data.sources.source import Example, Fingerprint, Skipped, sampled
from vmoe.errors import UsageError


@dataclasses.dataclass(frozen=True, eq=False)
class FileSource:
    """A split of a data set of image files; see ``Source``.

    Its pickle holds the names of the files, not their content.

    Attributes:
        folder: where the files are.
        files: their paths, relative to the folder.
        labels: the class of each file.
        sizes: in bytes.
        times: when each file was changed, in nanoseconds.
    """

    name: str
    folder: str
    files: tuple[str, ...] = dataclasses.field(repr=False)
    labels: Int[np.ndarray, "b"] = dataclasses.field(repr=False)
    sizes: Int[np.ndarray, "b"] = dataclasses.field(repr=False)
    times: Int[np.ndarray, "b"] = dataclasses.field(repr=False)
    class_names: tuple[str, ...]
    skipped: Skipped

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = str(Path(self.folder, self.files[index]))
        if path in self.skipped.unreadable:
            raise UsageError(f"{path}: cannot be read as an image")
        return Example(read_bytes(path), int(self.labels[index]), path)

    def select(self, index: Int[np.ndarray, "x"]) -> "FileSource":
        """The files at some indices, as a source of their own."""
        return dataclasses.replace(
            self,
            files=tuple(self.files[i] for i in index),
            labels=self.labels[index],
            sizes=self.sizes[index],
            times=self.times[index],
        )

    def fingerprint(self) -> Fingerprint:
        """Hashes of the class names, the labels, the names, sizes and times of the files, and of
        the content of some; not of where the folder is.
        """
        data = hashlib.sha256(repr((self.class_names, self.files)).encode(errors="surrogatepass"))
        data.update(self.labels.tobytes() + self.sizes.tobytes())
        content = hashlib.sha256()
        for i in sampled(len(self)):
            with contextlib.suppress(UsageError):  # it cannot be read
                content.update(read_bytes(Path(self.folder, self.files[i])))
        times = hashlib.sha256(self.times.tobytes())
        return Fingerprint(data.hexdigest(), times.hexdigest(), content.hexdigest())
