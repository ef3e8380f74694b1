"""Makes the data sets of ImageNet (ILSVRC 2012) from its official archives, in ArrayRecord form.

    python -m scripts.prepare.imagenet data/tfds --devkit ILSVRC2012_devkit_t12.tar.gz \\
        --train ILSVRC2012_img_train.tar --validation ILSVRC2012_img_val.tar --real real.json

It writes ``imagenet2012/5.1.0`` with the splits train and validation, with the names and splits of
TFDS, but without TensorFlow. Images are copied unchanged. ``--real`` is the file of "Are we done
with ImageNet?" (arXiv 2006.07159); with it the script also writes ``imagenet2012_real/1.0.0``: the
validation images, each with any number of labels. The number of images of every class is checked
against the devkit. The same command resumes after it was stopped.

    TFDS_DATA_DIR=data/tfds vmoe train ... --data.name tfds:imagenet2012:train[:99%]

ImageNet-V2 (arXiv 1902.10811) needs no preparation: the names of its folders are class numbers. Put
them into a folder ``test``, as in ``imagenet_v2/test/0`` to ``imagenet_v2/test/999``.

Evaluate models trained from scratch (imagenet1k_s32_light.py and _medium.py) with a capacity
factor of 4.0, as in the paper's code, here on ReaL labels and on ImageNet-V2:

    TFDS_DATA_DIR=data/tfds vmoe evaluate --checkpoint runs/imagenet1k_s32_light \\
        --data tfds:imagenet2012_real:validation --routing.capacity-factor 4.0
    vmoe evaluate --checkpoint runs/imagenet1k_s32_light \\
        --data folder:imagenet_v2:test --routing.capacity-factor 4.0

Evaluate models fine-tuned at 384 px (imagenet1k_s32_384.py and imagenet1k_b16_384.py) with their
training value of 1.5, which is the default:

    TFDS_DATA_DIR=data/tfds vmoe evaluate --checkpoint runs/imagenet1k_s32_384 \\
        --data tfds:imagenet2012_real:validation
    vmoe evaluate --checkpoint runs/imagenet1k_s32_384 --data folder:imagenet_v2:test
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmoe.host import signals

if __name__ == "__main__":
    signals.exit_at_once()  # before the imports, which take seconds

from scripts.prepare.archives import Archive, find_training, find_validation, read_devkit
from scripts.prepare.array_record import Split, is_complete, write


def split_of(archive: Archive, **labels: Sequence[Any]) -> Split:
    """The images of an archive with their names, and labels by the name of the feature."""
    fields = labels | {"file_name": archive.names}

    def fields_of(i: int) -> dict[str, Any]:
        return {name: values[i] for name, values in fields.items()}

    return Split(archive.names, archive.sizes, archive.offsets, archive.read, fields_of)


def read_real(path: Path, images: int, classes: int) -> list[list[int]]:
    """The ReaL labels of each validation image.

    Raises:
        SystemExit: the file has no list of labels for each image.
    """
    try:
        real = json.loads(path.read_text())
        wrong = [
            labels
            for labels in real
            if not isinstance(labels, list)
            or not all(isinstance(each, int) and 0 <= each < classes for each in labels)
        ]
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path}: cannot be read ({error})") from None
    if wrong or len(real) != images:
        raise SystemExit(
            f"{path}: {len(real):,} lists of labels for {images:,} images, "
            f"{len(wrong)} of them wrong"
        )
    print(f"{path}: {sum(not labels for labels in real):,} of {len(real):,} images have no label")
    return real


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("destination", type=Path, help="TFDS_DATA_DIR; made if it is missing")
    parser.add_argument("--devkit", type=Path, required=True, help="ILSVRC2012_devkit_t12.tar.gz")
    parser.add_argument("--train", type=Path, required=True, help="ILSVRC2012_img_train.tar")
    parser.add_argument("--validation", type=Path, required=True, help="ILSVRC2012_img_val.tar")
    parser.add_argument("--real", type=Path, help="real.json of ImageNet ReaL")
    options = parser.parse_args()
    imagenet = options.destination / "imagenet2012" / "5.1.0"
    real = options.destination / "imagenet2012_real" / "1.0.0"
    classes = read_devkit(options.devkit)
    validation = find_validation(options.validation, len(classes.validation))
    import tensorflow_datasets as tfds  # takes seconds

    label = tfds.features.ClassLabel(names=classes.synsets)
    name = {"file_name": tfds.features.Text()}
    if not is_complete(imagenet):
        train, labels = find_training(options.train, classes)
        splits = {
            "train": split_of(train, label=labels),
            "validation": split_of(validation, label=classes.validation),
        }
        write(imagenet, "imagenet2012", {"label": label, **name}, splits)
    if options.real and not is_complete(real):
        features = {"original_label": label, "real_label": tfds.features.Sequence(label), **name}
        real_labels = read_real(options.real, len(validation.names), len(classes.synsets))
        split = split_of(validation, original_label=classes.validation, real_label=real_labels)
        write(real, "imagenet2012_real", features, {"validation": split})


if __name__ == "__main__":
    main()
