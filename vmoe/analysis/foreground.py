"""Which patches show the object of an image, where the background has one plain colour."""

import numpy as np
from einops import reduce
from jaxtyping import Bool

from vmoe.axes import Images


def foreground(
    images: Images, patch_size: int, tolerance: float = 0.1
) -> Bool[np.ndarray, "b i j"]:
    """False for patches of background: every pixel has the colour of the image's border.

    The border's colour is the median of the outermost pixels, by channel. The rule suits objects on
    a plain colour, such as those of Fashion-MNIST and emoji; on photographs it means little, since
    hardly any patch is background, or only a plain sky is.

    Args:
        images: pixels in [-1, 1]; the patch size divides their sides.
        tolerance: largest difference of a background pixel from that colour, in any channel.
    """
    pixels, p = np.asarray(images), patch_size
    rows, columns = pixels[:, [0, -1]], pixels[:, 1:-1, [0, -1]]
    border = np.concatenate([x.reshape(len(x), -1, 3) for x in (rows, columns)], axis=1)
    distance = np.abs(pixels - np.median(border, axis=1)[:, None, None])
    return reduce(distance, "b (i p) (j q) c -> b i j", "max", p=p, q=p) > tolerance
