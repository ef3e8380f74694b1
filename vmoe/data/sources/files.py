"""A source that reads image files when they are needed."""

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
from jaxtyping import Int

from vmoe.data.decode import read_bytes
from vmoe.data.sources.source import Example


@dataclasses.dataclass(frozen=True, eq=False)
class FileSource:
    """A split of a data set of image files; see ``Source``.

    Its pickle holds the names of the files, not their content.

    Attributes:
        folder: where the files are.
        files: their paths, relative to the folder.
        skipped: the number of files in the folder that are not images.
    """

    name: str
    folder: str
    files: tuple[str, ...] = dataclasses.field(repr=False)
    labels: Int[np.ndarray, "b"] = dataclasses.field(repr=False)
    class_names: tuple[str, ...]
    skipped: int

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Example:
        path = str(Path(self.folder, self.files[index]))
        return Example(read_bytes(path), int(self.labels[index]), path)

    def fingerprint(self) -> str:
        """A hash of the class names, the labels, and the names of the files.

        It does not depend on where the folder is. It reads no file, so it does not detect changes
        in the content of a file.
        """
        digest = hashlib.sha256(repr((self.class_names, self.files)).encode())
        digest.update(self.labels.tobytes())
        return digest.hexdigest()
