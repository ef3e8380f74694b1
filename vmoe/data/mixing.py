"""Mixing of the images of one batch."""

import numpy as np
from jaxtyping import Float


def mixup(
    images: Float[np.ndarray, "b h w 3"],
    labels: Float[np.ndarray, "b y"],
    concentration: float,
    rng: np.random.Generator,
    *,
    devices: int = 1,
) -> tuple[Float[np.ndarray, "b h w 3"], Float[np.ndarray, "b y"]]:
    """Each image mixed with the next one of its device, and its label likewise.

    The two weights are drawn once for the batch from Dirichlet(concentration); the larger one
    belongs to the image itself ("mixup", arXiv 1710.09412, in V-MoE's form).
    """
    weight = np.float32(rng.dirichlet((concentration, concentration)).max())

    def mix(x: np.ndarray) -> np.ndarray:
        of_device = x.reshape(devices, -1, *x.shape[1:])
        return weight * x + (1 - weight) * np.roll(of_device, -1, axis=1).reshape(x.shape)

    return mix(images), mix(labels)
