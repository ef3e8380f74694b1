"""Routing records of a model's sparse blocks, together with its logits."""

from jaxtyping import Array, Float

from vmoe.axes import Images, Record, Valid
from vmoe.nn.keys import MaybeKey
from vmoe.nn.vit import ViT


def capture(
    model: ViT,
    images: Images,
    *,
    train: bool = False,
    key: MaybeKey = None,
    valid: Valid | None = None,
) -> tuple[Float[Array, "b y"], dict[int, Record]]:
    """``model(images)``, and the record of each sparse block by its number.

    Arguments as for the model. Works inside ``jax.jit`` and ``jax.grad``, where unused parts of
    the records are not computed.
    """
    return model.forward(images, train=train, key=key, valid=valid)
