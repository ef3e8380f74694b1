"""Pictures prepared for ViTs by the image processors of transformers, rounded to whole pixels.

The processors resize uint8 tensors with torchvision, if that is installed, as it is here.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BitImageProcessor, DeiTImageProcessor, ViTImageProcessor

SHAPES = [(45, 61), (64, 41), (9, 13), (24, 60)]  # height, width
SQUARE = {"height": 24, "width": 24}
PROCESSORS = {
    "vit": ViTImageProcessor(size=SQUARE),
    "vit_lanczos": ViTImageProcessor(size=SQUARE, resample=1),
    "deit": DeiTImageProcessor(size=SQUARE, crop_size={"height": 21, "width": 21}),
    "dinov2": BitImageProcessor(size={"shortest_edge": 19}, crop_size={"height": 16, "width": 16}),
}


def write(path: Path) -> None:
    """Stores pictures as ``picture/i``, and the JSON and the pixels of each processor as
    ``NAME/config`` and ``NAME/i``."""
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (*shape, 3), dtype=np.uint8) for shape in SHAPES]
    arrays: dict[str, Any] = {f"picture/{i}": picture for i, picture in enumerate(pictures)}
    for name, processor in PROCESSORS.items():
        arrays[f"{name}/config"] = np.array(json.dumps(processor.to_dict()))
        for i, picture in enumerate(pictures):
            tensor = torch.from_numpy(picture).permute(2, 0, 1)
            (pixels,) = processor(tensor, do_rescale=False, do_normalize=False).pixel_values
            arrays[f"{name}/{i}"] = pixels.numpy().transpose(1, 2, 0)
    np.savez_compressed(path, **arrays)
