"""How images are prepared for a trained model."""

import dataclasses

from vmoe.config.fields import Checked, require


@dataclasses.dataclass(frozen=True)
class Preprocessing(Checked):
    """How pixels of any size become the input of a trained model, in [-1, 1]."""

    image_size: int
    """Side in pixels to which an image is resized, bilinearly; its aspect ratio is not kept."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image_size >= 1, f"preprocessing.image_size={self.image_size}: use at least 1")
