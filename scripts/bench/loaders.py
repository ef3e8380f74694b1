"""The loaders of other libraries, each on one thread, for the same work as our pipeline.

Each reads batches of JPEG files from a folder with a sub-folder per class, in random order. It
decodes them, resizes a random crop bilinearly, flips half of them, and returns uint8 pixels.
"""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

Run = Callable[[], None]


def tf_data(folder: Path, batch: int, size: int, min_area: float, batches: int) -> Run:
    """tf.data, which decodes only the crop.

    Args:
        size: side of the result, in pixels.
        min_area: smallest share of the area that a crop covers.
        batches: number of batches that are read.
    """
    import tensorflow as tf

    def read(path: tf.Tensor) -> tf.Tensor:
        encoded = tf.io.read_file(path)
        start, sides, _ = tf.image.sample_distorted_bounding_box(
            tf.image.extract_jpeg_shape(encoded),
            tf.zeros([0, 0, 4]),
            min_object_covered=0.0,
            area_range=(min_area, 1.0),
            use_image_if_no_bounding_boxes=True,
        )
        box = tf.concat([start[:2], sides[:2]], 0)
        pixels = tf.image.decode_and_crop_jpeg(encoded, box, channels=3)
        pixels = tf.image.random_flip_left_right(tf.image.resize(pixels, (size, size)))
        return tf.cast(pixels, tf.uint8)

    tf.config.set_visible_devices([], "GPU")
    options = tf.data.Options()
    options.autotune.enabled = False
    options.threading.private_threadpool_size = 1
    options.threading.max_intra_op_parallelism = 1
    files = sorted(map(str, folder.rglob("*.jpg")))
    paths = tf.data.Dataset.from_tensor_slices(files).shuffle(len(files))
    return _reading(paths.map(read).batch(batch).with_options(options), batches)


def timm(folder: Path, batch: int, size: int, min_area: float, batches: int) -> Run:
    """timm's training loader, without its normalization on the device; see ``tf_data``."""
    import torch
    from timm.data import ImageDataset, create_loader

    torch.set_num_threads(1)
    loader = create_loader(
        ImageDataset(str(folder)),
        (3, size, size),
        batch,
        is_training=True,
        scale=(min_area, 1.0),
        color_jitter=None,
        num_workers=0,
        persistent_workers=False,
        device=torch.device("cpu"),
    )
    return _reading(loader.loader, batches)


def torchvision(folder: Path, batch: int, size: int, min_area: float, batches: int) -> Run:
    """torchvision's transforms on Pillow images; see ``tf_data``."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    torch.set_num_threads(1)
    crop = v2.RandomResizedCrop(size, scale=(min_area, 1.0))
    steps = v2.Compose([crop, v2.RandomHorizontalFlip(), v2.PILToTensor()])
    return _reading(DataLoader(ImageFolder(str(folder), steps), batch, shuffle=True), batches)


def _reading(loader: Iterable[object], batches: int) -> Run:
    def run() -> None:
        for _ in itertools.islice(loader, batches):
            pass

    return run


LOADERS = {"tensorflow": tf_data, "timm": timm, "torchvision": torchvision}
"""The loaders, by the package that each needs."""
