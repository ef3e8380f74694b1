"""Mixup of the images of one batch."""

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
    """Mixes each image with the next one on its device, and the labels with the same weights.

    The two weights are drawn once per batch, from Dirichlet(concentration); the larger one goes to
    the image itself.

    Args:
        images: pixels in [-1, 1].
        labels: probabilities; sum to 1 over y.
        concentration: both parameters of the Dirichlet distribution, more than 0.
        devices: number of devices that the batch is split over; it divides b.

    Source: "mixup: Beyond Empirical Risk Minimization" (arXiv 1710.09412, section 2); choosing the
    larger weight follows V-MoE's code.
    """
    weight = np.float32(rng.dirichlet((concentration, concentration)).max())

    def mix(x: np.ndarray) -> np.ndarray:
        per_device = x.reshape(devices, -1, *x.shape[1:])
        return weight * x + (1 - weight) * np.roll(per_device, -1, axis=1).reshape(x.shape)

    return mix(images), mix(labels)
