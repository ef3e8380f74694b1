"""Read the TensorBoard events of a run."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event


def events(workdir: Path) -> Iterator[Event]:
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:  # TFRecord: length, its checksum, the event, its checksum
            length = int.from_bytes(content[:8], "little")
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def scalars(workdir: Path) -> dict[tuple[str, int], float]:
    """By tag and step."""
    return {
        (value.tag, event.step): value.simple_value
        for event in events(workdir)
        for value in event.summary.value
        if not value.HasField("image")
    }


def pictures(workdir: Path) -> dict[tuple[str, int], np.ndarray]:
    """By tag and step."""
    return {
        (value.tag, event.step): np.asarray(
            Image.open(io.BytesIO(value.image.encoded_image_string))
        )
        for event in events(workdir)
        for value in event.summary.value
        if value.HasField("image")
    }
