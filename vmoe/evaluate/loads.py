"""How often each expert is chosen over a whole split."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from vmoe.analysis.measures import choices_per_expert
from vmoe.axes import Routing
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.pipeline import Batch, evaluation_batches
from vmoe.data.sources import Source
from vmoe.errors import UsageError
from vmoe.nn.vit import ViT


def expert_loads(
    model: ViT,
    source: Source,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 256,
    on_unreadable: Callable[[UsageError], None] | None = None,
) -> dict[int, Float[np.ndarray, "e"]]:
    """By sparse block: the number of choices of each expert, before any is dropped.

    For soft routing, which makes no choices, the sum of the gates.

    Args:
        on_unreadable: as for ``evaluate``.

    Raises:
        UsageError: an image cannot be read, or the source has more classes than the model.
    """
    graph, state = nnx.split(model)
    loads = {i: np.zeros(moe.num_experts) for i, moe in model.config.moe_blocks.items()}
    for batch in evaluation_batches(
        source,
        batch_size=batch_size,
        num_classes=model.config.num_classes,
        preprocessing=preprocessing,
        on_unreadable=on_unreadable,
    ):
        for block, load in jax.device_get(_loads(graph, state, batch)).items():
            loads[block] += load
    return loads


@functools.partial(jax.jit, static_argnums=0)
def _loads(graph: nnx.GraphDef, state: nnx.State, batch: Batch) -> dict[int, Float[Array, "e"]]:
    _, records = nnx.merge(graph, state).forward(batch.images, valid=batch.valid)
    return {
        block: choices_per_expert(record.routing)
        if isinstance(record.routing, Routing)
        else jnp.where(record.valid[..., None], record.gates, 0.0).sum((0, 1))
        for block, record in records.items()
    }
