"""Published V-MoE checkpoints, and ViTs in .npz files: the original, AugReg's, big_vision's.

All have the tanh GELU, epsilon 1e-6 and pixels in [-1, 1] (``configs/`` and ``models/vit.py`` of
google-research/big_vision and google-research/vision_transformer). Settings that follow from no
name and shape are assumed to be the V-MoE authors' settings.
"""

from pathlib import Path

from vmoe import zoo
from vmoe.checkpoints import chunked, npz
from vmoe.checkpoints.family import Family, summary
from vmoe.checkpoints.flax_names import rename
from vmoe.checkpoints.stored import Origin
from vmoe.config import Exchange, MoEConfig, TokenChoice
from vmoe.config.preprocessing import Preprocessing

ASSUMED = MoEConfig(exchange=Exchange(dtype="bfloat16"), router=TokenChoice(capacity_factor=1.05))
"""Settings of MoE layers; 1.05 is the authors' capacity factor in pre-training."""
SOURCE = "as in the authors' pre-training"
PRE_TRAINED = 224  # pixels; models of other sizes were fine-tuned


def published(prefix: Path) -> Family:
    """A checkpoint of the V-MoE authors; if it is in the zoo, with the settings of its training."""
    arrays, entry = chunked.read(prefix), zoo.published(prefix.name)
    family = Family(
        Origin("published", prefix), arrays, rename, _prepared, moe=ASSUMED, capacity_source=SOURCE
    )
    if entry is None:
        return family
    moe = next(iter(entry.config.moe_blocks.values()))
    return family._replace(moe=moe, capacity_source=entry.capacity_source, loss=entry.loss)


def vit_npz(path: Path) -> Family:
    """A ViT, or a V-MoE, in a .npz file."""
    return Family(
        Origin("npz", path),
        npz.read(path),
        rename,
        _prepared,
        given={"activation": "gelu_tanh", "norm_epsilon": 1e-6},
        moe=ASSUMED,
        capacity_source=SOURCE,
    )


def _prepared(image_size: int) -> tuple[Preprocessing, list[str]]:
    """How the V-MoE authors evaluate models of an image size, with TensorFlow, which ignores EXIF.

    Pre-trained models: the shorter side is resized to 256 px by area averaging, then the center is
    cropped. Fine-tuned ones: the image is resized bilinearly.
    """
    if image_size == PRE_TRAINED:
        found = Preprocessing(224, 256, keep_aspect=True, interpolation="tf_area", exif=False)
    else:
        found = Preprocessing(image_size, interpolation="tf_bilinear", exif=False)
    return found, [summary(found)]
