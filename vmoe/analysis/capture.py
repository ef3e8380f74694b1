"""Routing records of a model's sparse blocks, together with its logits."""

from collections.abc import Mapping

from jaxtyping import Array, Float

from vmoe.axes import Images, Record, Route, Valid
from vmoe.nn.keys import MaybeKey
from vmoe.nn.vit import ViT


def capture(
    model: ViT,
    images: Images,
    *,
    train: bool = False,
    key: MaybeKey = None,
    valid: Valid | None = None,
    decide: Mapping[int, Route] | None = None,
) -> tuple[Float[Array, "b y"], dict[int, Record]]:
    """``model(images)``, and the record of each sparse block by its number.

    Works inside ``jax.jit`` and ``jax.grad``, where unused parts of the records are not computed.

    Args:
        train, key, valid: as for the model.
        decide: by block, a function that decides in place of its router, such as those of
            ``vmoe/analysis/interventions.py``.
    """
    return model.forward(images, train=train, key=key, valid=valid, decide=decide)
