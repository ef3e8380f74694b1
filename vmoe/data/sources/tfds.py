"""TensorFlow Datasets in ArrayRecord form, read at random and without TensorFlow.

    tfds:NAME[/CONFIG][:VERSION]     below the folder TFDS_DATA_DIR, or ~/tensorflow_datasets
    tfds:/PATH, tfds:./PATH          the folder of a data set, or of one of its versions

The split may be any split of TFDS, such as ``train[:99%]`` or ``train+validation``. If validation
is missing, it is ``train[90%:]``, and train is ``train[:90%]``; ``train[:100%]`` is all of it.

The image is the feature ``image``, or else the only Image feature; others, such as a segmentation
mask, are not decoded. The label is the first of the features ``label``, ``labels`` and
``real_label``: a ClassLabel or a Sequence of them; -1 means no label. The classes have the names of
that feature.

Labels are stored with the images. To find the labels of all examples, or the largest number of
labels in a Sequence, one process reads every record with its image once, and keeps the labels in an
index (``index.py``). For a Sequence this happens before the first step. Records of 100 kB in the
page cache take 0.3 ms each: 6 minutes for 1.3 million, a day for 300 million, and longer on slow
storage. For many millions of images with several labels use ``manifest:`` or ``tar:``, which read
labels without images. Building the index checks all labels. If no index is needed, as for training
on a ClassLabel, only 64 examples are checked first; a label without a class is an error when it is
read.

TFDS prepares many data sets only with TensorFlow. ``scripts/prepare/imagenet.py`` and
``scripts/prepare/folder.py`` write this form without it. Other forms are an error: reading tfrecord
files needs TensorFlow, and Parquet files of TFDS lose rows.
"""

import contextlib
import errno
import functools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmoe.data.files import read_bytes
from vmoe.data.sources.index import Index, IndexWriter, cached, is_cached, state_of
from vmoe.data.sources.source import BaseSource, Example, digest, sampled
from vmoe.data.sources.splits import SPLITS, resolve_split
from vmoe.errors import UsageError, one_line, reading, unknown
from vmoe.host.progress import tracked
from vmoe.host.retry import retried

LABELS = ("label", "labels", "real_label")  # features of labels; the first one counts
# A reader keeps the offset of every record in memory, in 8 bytes; or it reads the offset from the
# shard each time, which takes 10 to 20 times as long.
IN_MEMORY = 10_000_000  # records, up to which the offsets are in memory
OFFLOADED = {"index_storage_option": "offloaded", "footer_prefetch_bytes": "0"}
SCANNED = 1024  # records between two reports of progress; one at a time is as fast as a batch
FEW = 1024  # labels that are read from their records, at most, before an index of all is made
INFO = "dataset_info.json"
NUMBERS = {os.strerror(number): number for number in errno.errorcode}
SPARE_FILES = 256  # that a process may have open in addition to the shards


def open_tfds(name: str, split: str) -> "TfdsSource":
    """Opens a split, after checking that its files have the number of examples in its metadata.

    Args:
        name: NAME[/CONFIG][:VERSION], or a path.
    """
    folder = _find(name)
    source = TfdsSource(f"tfds:{name}:{split}", str(folder), split)
    source.check()
    return source


def _find(name: str) -> Path:
    """The folder of a version of a data set."""
    place = f"tfds:{name}"
    if name[0] in "/.":
        return _version(Path(name), "", place)
    data_dir = Path(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()
    dataset, _, version = name.partition(":")
    folder = data_dir / dataset
    if not folder.is_dir():
        known = sorted(each.name for each in data_dir.glob("*") if each.is_dir())
        raise UsageError(
            unknown(f"{place}: {data_dir} (TFDS_DATA_DIR) has no data set", dataset, known)
            if known
            else f"{place}: no data sets in {data_dir}; set TFDS_DATA_DIR, or give tfds:/PATH"
        )
    return _version(folder, version, place)


def _version(folder: Path, version: str, place: str) -> Path:
    """The folder of the requested version, or of the last one."""
    if not version and (folder / INFO).is_file():
        return folder
    versions = [each.name for each in folder.glob("*") if (each / INFO).is_file()]
    if version and version not in versions:
        raise UsageError(unknown(f"{place}: no version", version, sorted(versions)))
    if not versions:
        configs = sorted({each.parent.parent.name for each in folder.glob(f"*/*/{INFO}")})
        hint = f"choose from {', '.join(f'{place}/{each}' for each in configs)}"
        raise UsageError(
            f"{place}: {hint}" if configs else f"{folder}: no prepared data set ({INFO}) in it"
        )
    last = max(versions, key=lambda each: [int(part) for part in re.findall(r"\d+", each)])
    return folder / (version or last)


class TfdsSource(BaseSource):
    """A split of a TFDS data set in ArrayRecord form."""

    def __init__(self, name: str, folder: str, split: str):
        import tensorflow_datasets as tfds

        self.name, self._folder = name, folder
        info = _info(folder)
        self._split = _tfds_split(split, list(info.splits), folder)
        try:
            self._shards = info.splits[self._split].file_instructions
        except ValueError as error:
            raise UsageError(f"{folder}: {one_line(str(error))}") from None
        if not self._shards or min(shard.take for shard in self._shards) < 1:
            raise UsageError(f"{folder}: the split {split!r} has no images")
        self._image, self._label = _features(info.features, folder)
        self._features = tfds.features.FeaturesDict(  # PartialDecoding imports TensorFlow
            {name: info.features[name] for name in (self._image, self._label)}
        )
        self._decoders = {self._image: tfds.decode.SkipDecoding()}
        label = self._features[self._label]
        self.class_names = tuple(getattr(label, "feature", label).names)
        _allow_open_files(len(self._shards), folder)
        self._records = self._opened()

    @functools.cached_property
    def max_labels(self) -> int:
        single = not hasattr(self._features[self._label], "feature")
        return 1 if single else self._labels.info["max_labels"]

    def __len__(self) -> int:
        return len(self._records)

    def _opened(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        records = sum(shard.examples_in_shard for shard in self._shards)
        return ArrayRecordDataSource(
            self._shards, reader_options=OFFLOADED if records > IN_MEMORY else None
        )

    def _record(self, row: int) -> bytes:
        def read() -> bytes:
            try:
                with _system_errors():
                    return self._records[row]
            except OSError:
                self._records = self._opened()  # a reader that has failed does not recover
                raise

        return retried(f"{self.name}[{row}]", read)

    def __getitem__(self, index: int) -> Example:
        row = range(len(self))[index]
        origin = f"{self.name}[{row}]"
        with reading(origin):
            record = self._record(row)
            fields = self._features.deserialize_example_np(record, decoders=self._decoders)
        labels = np.atleast_1d(fields[self._label]).tolist()
        labels = tuple(label for label in labels if label != -1)
        if labels and not 0 <= min(labels) <= max(labels) < len(self.class_names):
            raise UsageError(
                f"{origin}: label {labels} is out of range; its feature has "
                f"{len(self.class_names)} classes"
            )
        return Example(fields[self._image], labels, origin)

    def labels_of(self, index: int) -> tuple[int, ...]:
        if self._few:
            self._few -= 1
            return self[index].labels
        return tuple(self._labels.values("labels", index).tolist())

    @functools.cached_property
    def _few(self) -> int:
        """How many more labels are read from their records: none if there is an index of all."""
        return 0 if is_cached(*self._index_key) else min(FEW, len(self) // 2)

    @functools.cached_property
    def _labels(self) -> Index:
        """The labels of all examples."""
        return Index(cached(*self._index_key, self._build_labels))

    @functools.cached_property
    def _index_key(self) -> tuple[str, list[tuple[int, int]]]:
        """The place and the key of the index of the labels."""
        place = f"tfds:{os.path.abspath(self._folder)}:{self._split}"
        return place, [state_of(shard.filename) for shard in self._shards]

    def _build_labels(self, target: Path) -> None:
        most, starts = 1, range(0, len(self), SCANNED)
        with IndexWriter(target) as index:
            for start in tracked(starts, f"reading the labels of {self.name}", len(starts)):
                rows = range(start, min(start + SCANNED, len(self)))
                labels = [self[i].labels for i in rows]
                most = max(most, *map(len, labels))
                index.append_lists("labels", labels)
            index.finish(max_labels=most)

    def check(self) -> None:
        """Checks the number of examples of every shard, and that some examples can be read."""
        for shard in self._shards:
            found = count_records(shard.filename)
            if found != shard.examples_in_shard:
                raise UsageError(
                    f"{shard.filename}: has {found:,} examples, not {shard.examples_in_shard:,} as "
                    f"in {INFO}; prepare the data set again"
                )
        for i in sampled(len(self)):
            image = self[i].image
            if not (isinstance(image, bytes) and image):
                raise UsageError(f"{self.name}[{i}]: has no image; store it as PNG or JPEG")

    def _description(self) -> tuple[str, str]:
        """Hashes of the class names and of the names, sizes and times of the shards."""
        shards = [(os.path.basename(s.filename), s.skip, s.take) for s in self._shards]
        states = [state_of(shard.filename) for shard in self._shards]
        sizes = [size for size, _ in states]
        return digest((self.class_names, shards, sizes)), digest([time for _, time in states])

    def _content(self, index: int) -> bytes:
        return self._record(index)


def _info(folder: str) -> Any:
    """The metadata of a version, in ArrayRecord form."""
    import tensorflow_datasets as tfds

    with reading(folder):
        read_bytes(Path(folder, INFO))  # an error that can pass is a Failure
        info = tfds.builder_from_directory(folder).info
    if info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        why = {
            tfds.core.FileFormat.TFRECORD: "which only TensorFlow can read",
            tfds.core.FileFormat.PARQUET: "from which rows are lost",
        }.get(info.file_format, "which is not supported")
        raise UsageError(
            f"{folder}: is stored as {info.file_format.value}, {why}; prepare it with "
            "file_format='array_record'"
        )
    return info


def _tfds_split(split: str, available: Sequence[str], folder: str) -> str:
    """The name of a split in TFDS; a missing validation split is split off train."""
    if split not in SPLITS:
        return split
    stored_split, fractions = resolve_split(split, available, folder)
    if not fractions:
        return stored_split
    percent = 100 - round(100 * fractions["validation"])
    return f"{stored_split}[{f':{percent}%' if split == 'train' else f'{percent}%:'}]"


def _features(features: Any, folder: str) -> tuple[str, str]:
    """The names of the features of the image and of the label."""
    import tensorflow_datasets as tfds

    names = ", ".join(sorted(features))
    images = [name for name, each in features.items() if isinstance(each, tfds.features.Image)]
    if len(images) != 1 and "image" not in images:
        raise UsageError(
            f"{folder}: {len(images)} of the features {names} are images; prepare it with an Image "
            "feature named 'image'"
        )
    label = next((name for name in LABELS if name in features), None)
    if label is None:
        raise UsageError(
            f"{folder}: none of the features {names} is a label; prepare it with a ClassLabel "
            f"named {' or '.join(map(repr, LABELS))}"
        )
    inner = getattr(features[label], "feature", features[label])
    if not isinstance(inner, tfds.features.ClassLabel):
        raise UsageError(
            f"{folder}: the feature {label} is {inner}; prepare it as a ClassLabel, or a Sequence "
            "of them"
        )
    return "image" if "image" in images else images[0], label


def count_records(shard: str) -> int:
    """The number of examples in a shard."""
    from array_record.python.array_record_module import ArrayRecordReader

    def count() -> int:
        with _system_errors():
            reader = ArrayRecordReader(shard)
            records = reader.num_records()
            reader.close()  # raises earlier errors
            return records

    with reading(shard, "truncated or corrupt", "; prepare the data set again"):
        try:
            return retried(shard, count)
        except FileNotFoundError:
            raise UsageError(
                f"{shard}: no such file; the data set is incomplete, prepare it again"
            ) from None


@contextlib.contextmanager
def _system_errors() -> Iterator[None]:
    """Turns a reader's error about a system error into the OSError itself."""
    try:
        yield
    except RuntimeError as error:
        found = re.search(r"\w\(\) failed: ([^;]+)", str(error))
        if found is None or found[1] not in NUMBERS:
            raise
        raise OSError(NUMBERS[found[1]], found[1]) from None


def _allow_open_files(count: int, place: str) -> None:
    """Raises the limit of open files, because every shard stays open in every process."""
    import resource  # not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + SPARE_FILES
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{place}: its {count:,} shards need {needed:,} open files, more than the limit of "
            f"{hard:,}; raise it (ulimit -Hn), or prepare the data set in fewer, larger shards"
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
