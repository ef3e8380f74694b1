"""Few-shot probes of a model: their data sets, numbers of images and interval."""

import dataclasses
from typing import Annotated, Literal

from vmoe.config.preprocessing import Preprocessing
from vmoe.fields import NOT_EMPTY, Checked, Count, Seed, at_least, replace

PAPER_DATA = (
    "tfds:caltech_birds2011:train[:100%],test",  # Caltech-UCSD Birds 200
    "tfds:caltech101:train[:100%],test",
    "tfds:cars196:train[:100%],test",
    "tfds:cifar100:train[:100%],test",
    "tfds:colorectal_histology:train[:2000],train[2000:]",
    "tfds:dtd",  # Describable Textures
    "tfds:imagenet2012_subset/10pct:train,validation",
    "tfds:oxford_iiit_pet:train[:100%],test",
    "tfds:uc_merced:train[:1000],train[1000:]",  # land use, seen from above
)
"""The nine data sets and splits of the V-MoE authors' few-shot evaluations (their
``configs/common_fewshot.py``), for those who have prepared them with TensorFlow Datasets."""

PAPER_PREPROCESSING = Preprocessing(224, resize_to=256, interpolation="tf_bilinear")
"""The preprocessing of these evaluations, for models of 224 px."""


@dataclasses.dataclass(frozen=True)
class FewShotConfig(Checked):
    """Few-shot probes: a linear model on frozen features, from a few images of each class."""

    section = "fewshot"

    data: tuple[str, ...] = ()
    """Data sets: NAME for its splits train and test, or NAME:TRAIN,TEST; none for no probe. Their
    classes need not be those of the model."""
    shots: Annotated[tuple[Annotated[int, at_least(1)], ...], NOT_EMPTY] = (1, 5, 10, 25)
    """Numbers of training images per class; each is a probe."""
    every: Count = 5000
    """Steps of training between probes; the last step is always probed."""
    seed: Seed = 0
    """Seed of the choice of the training images."""
    choose_l2: Literal["test", "train"] = "test"
    """Images on which one L2 per number of shots is chosen, for all data sets together. test: the
    test images, as the paper does, so the reported accuracies are optimistic; train: other training
    images, as many of each class as the largest number of shots."""
    preprocessing: Literal["model", "paper"] = "model"
    """How the images are prepared. model: as for the model, which in a run means as for its first
    evaluation set; paper: resized to 256/224 of the model's size, then cropped at the center."""
    batch_size: Count = 256
    """Images per batch in which features are computed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("data", "shots"):
            values = getattr(self, name)
            self.require(len(values) == len(set(values)), "give each once", name)

    def prepare(self, own: Preprocessing) -> Preprocessing:
        """How the images are prepared for a model whose own preprocessing is given."""
        if self.preprocessing == "model":
            return own
        paper = PAPER_PREPROCESSING.scaled(own.image_size)
        return replace(paper, exif=own.exif, max_pixels=own.max_pixels)

    @property
    def images_per_class(self) -> int:
        """The largest number of training images of a class that are read."""
        return max(self.shots) * (2 if self.choose_l2 == "train" else 1)
