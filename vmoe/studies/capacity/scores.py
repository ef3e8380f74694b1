"""Scores of a model on some images with settings of its sparse blocks.

One compiled program serves all settings. It has the largest number of slots and the largest k; the
slots, k and priority of each block are its arguments.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from vmoe import models
from vmoe.analysis.interventions import limited
from vmoe.config import MoEConfig, ViTConfig, replace
from vmoe.config.routing_file import LayerSetting
from vmoe.data.pipeline import Batch
from vmoe.errors import require
from vmoe.evaluate.metrics import check_finite
from vmoe.nn.inputs import has_label, is_label
from vmoe.nn.patches import num_tokens
from vmoe.nn.vit import ViT
from vmoe.routing.groups import group_sizes
from vmoe.routing.priority import PRIORITIES
from vmoe.studies.capacity.settings import Levels, Setting

SHARPNESS = 3.0  # factor of the logits, since label smoothing makes flat predictions


class Score(NamedTuple):
    """The score of a setting on some images.

    Attributes:
        accuracy: accuracy on the images with a label, in [0, 1].
        divergence: mean Kullback-Leibler divergence in nats from the predictions of the model as
            trained; both are the softmax of sharpened logits, even if another loss trained the
            model. It needs far fewer images than the accuracy to rank settings, and unlike the
            cross-entropy does not reward higher confidence.
    """

    accuracy: float
    divergence: float


class Scores:
    """The scores of settings on some images; one compiled program serves all of them.

    Attributes:
        trained: accuracy of the model as trained.
        images: number of images, including images without a label.
    """

    def __init__(
        self,
        model: ViT,
        batches: Iterable[Batch],
        levels: Sequence[Levels],
        *,
        on_step: Callable[[], None] = lambda: None,
    ):
        """Reads all batches, and predicts them with the model as trained.

        Args:
            batches: inputs of the model; all batches have one size.
            on_step: called after each setting.

        Raises:
            UsageError: no image has a label.
            Failure: a logit of the model as trained is NaN or infinite.
        """
        self._on_step = on_step
        self._known: dict[Setting, Score] = {}
        as_trained = _logits(model)
        self._batches, correct, labeled = [], [], []
        for batch in batches:
            on_devices = model.placement.make_global_array(batch)  # once, for all settings
            logits = as_trained(on_devices)
            self._batches.append((on_devices, logits))
            own, labels = np.asarray(logits)[batch.valid], batch.labels[batch.valid]
            check_finite(own)
            correct.append(is_label(own.argmax(-1), labels))
            labeled.append(has_label(labels))
        known = np.concatenate(labeled)
        require(bool(known.any()), "no image has a label")
        self.images = len(known)
        self.trained = float(np.concatenate(correct)[known].mean())
        self._counts = np.array([known.sum(), self.images])  # for accuracy and divergence
        share = len(self._batches[0][1]) // model.placement.devices
        size = self._batches[0][0].images.shape[1]  # may differ from the config's
        self._slots = _slots(replace(model.config, image_size=size), levels, share)
        self._sums = _sums(_widest(model, self._slots))

    def of(self, setting: Setting) -> Score:
        """The score of a setting, which is computed once."""
        if setting not in self._known:
            traced = np.array(
                [
                    (slots[own], PRIORITIES.index(own.priority), own.k)
                    for own, slots in zip(setting, self._slots, strict=True)
                ],
                np.int32,
            )
            sums = [self._sums(traced, *batch) for batch in self._batches]
            means = np.sum(jax.device_get(sums), 0) / self._counts
            self._known[setting] = Score(*means.tolist())
            self._on_step()
        return self._known[setting]


def _slots(config: ViTConfig, levels: Sequence[Levels], b: int) -> list[dict[LayerSetting, int]]:
    """By sparse block: slots per expert in the groups of b images of a device."""

    def slots(moe: MoEConfig) -> int:
        _, images = group_sizes(b, moe.router.images_per_group)
        return moe.slots(images * num_tokens(config))

    return [
        {own: slots(own.apply(moe)) for level in tried for own in level.values()}
        for moe, tried in zip(config.moe_blocks.values(), levels, strict=True)
    ]


def _widest(model: ViT, slots: Sequence[Mapping[LayerSetting, int]]) -> ViT:
    """The model with the most slots and the largest k of all settings."""
    layers = tuple(
        replace(
            moe,
            router=replace(
                moe.router.with_slots(capacity=max(own.values())),
                k=max(setting.k for setting in own),
            ),
        )
        for moe, own in zip(model.config.moe_blocks.values(), slots, strict=True)
    )
    params = models.params_of(model)
    return models.with_params(replace(model.config, moe=layers), params, placement=model.placement)


@models.compiled
def _logits(model: ViT, batch: Batch) -> Float[Array, "b y"]:
    return model.placement.replicate(model.forward(batch.images, valid=batch.valid)[0])


@models.compiled
def _sums(
    model: ViT,
    setting: Int[Array, "x 3"],
    batch: Batch,
    trained: Float[Array, "b y"],
) -> Float[Array, "2"]:
    """Sums over the images of correct predictions and of the divergence from the trained model."""
    decide = {block: limited(*setting[i]) for i, block in enumerate(model.config.sparse_blocks)}
    logits, _ = model.forward(jnp.asarray(batch.images), valid=batch.valid, decide=decide)
    before, after = (jax.nn.log_softmax(SHARPNESS * each) for each in (trained, logits))
    divergence = (jnp.exp(before) * (before - after)).sum(-1)
    both = jnp.stack([is_label(logits.argmax(-1), jnp.asarray(batch.labels)), divergence])
    return model.placement.replicate(jnp.where(batch.valid, both, 0.0).sum(-1))
