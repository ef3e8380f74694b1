"""Few-shot evaluation: how well a linear probe classifies by a model's features.

The features are the inputs of the model's last linear layer, after the pre-logits. The protocol is
that of the V-MoE authors (arXiv 2106.05974): ``vmoe/evaluate/probe.py`` fits the probe, and for
each number of shots one L2 is chosen for all data sets, by the mean rank of its accuracies ON THE
TEST IMAGES. This makes accuracies comparable with the paper's, but optimistic, all the more with a
single data set. ``choose_l2="train"`` chooses on training images that are no shots instead: most of
the paper's data sets have no validation split. The authors prepare the images of all data sets in
one way; by default they are prepared as for the model (``FewShotConfig.preprocessing``).

Which images are drawn depends on the order of the data too, so the shots are not those of the
paper. Under a capacity the features depend on the batch, as an evaluation does.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from vmoe import distributed
from vmoe.config.fewshot import FewShotConfig
from vmoe.config.preprocessing import Preprocessing
from vmoe.data.pipeline import empty_batch, evaluation_batches
from vmoe.data.reading import OnWait, print_wait
from vmoe.data.sources import Source
from vmoe.data.workers import IN_THREADS, Workers
from vmoe.errors import Failure, UsageError
from vmoe.evaluate.classification import in_source_order
from vmoe.evaluate.fewshot_data import FewShotData
from vmoe.evaluate.probe import L2, Probe, choose_l2, fit, place_in_class
from vmoe.nn.inputs import to_float
from vmoe.nn.vit import ViT


@dataclasses.dataclass(frozen=True)
class FewShotResult:
    """The accuracies of the probes on the test images of each data set."""

    shots: tuple[int, ...]
    l2: tuple[float, ...]
    """The chosen one for each number of shots."""
    by_l2: dict[str, Float[np.ndarray, "x l"]]
    """By data set: the accuracy of each number of shots with each L2."""

    @property
    def accuracy(self) -> dict[str, list[float]]:
        """By data set: the accuracy of each number of shots with the chosen L2."""
        chosen = [L2.index(l2) for l2 in self.l2]
        rows = range(len(self.shots))
        return {name: table[rows, chosen].tolist() for name, table in self.by_l2.items()}

    @property
    def mean(self) -> list[float]:
        """The mean of these accuracies over the data sets."""
        return np.mean(list(self.accuracy.values()), axis=0).tolist()


class _Labelled(NamedTuple):
    features: Float[np.ndarray, "b r"]
    labels: Int[np.ndarray, "b"]


def fewshot(
    model: ViT,
    data: Sequence[FewShotData],
    config: FewShotConfig,
    preprocessing: Preprocessing,
    *,
    image_size: int | None = None,
    on_batch: Callable[[], None] = lambda: None,
    on_unreadable: Callable[[str], None] | None = None,
    workers: Workers = IN_THREADS,
    on_wait: OnWait = print_wait,
) -> FewShotResult:
    """Probes a model on data sets.

    Args:
        data: as ``open_fewshot`` opens it with the same config.
        preprocessing: the model's own; the config says whether it is used.
        image_size: side of the model's input in pixels, to which the preprocessing is scaled; its
            own size if None.
        on_batch: called before each batch and each fit; an exception that it raises ends the probe.
        on_unreadable: called with the reason for each image that is left out because it cannot be
            read; if None, the reason is raised.
        workers, on_wait: as for ``evaluation_batches``.

    Raises:
        UsageError: image_size is not a multiple of the patch size; or no image of a split can be
            read, or none is left on which to choose the L2.
        Failure: a feature is NaN or infinite.
    """
    size = preprocessing.image_size if image_size is None else image_size
    read = functools.partial(
        _read,
        model,
        preprocessing=config.prepare(preprocessing.scaled(size)),
        batch_size=config.batch_size,
        on_batch=on_batch,
        on_unreadable=on_unreadable,
        workers=workers,
        on_wait=on_wait,
    )
    on_test, to_choose = {}, []
    for each in data:
        train = read(each.train, each.train_labels)
        test = read(each.test, each.test_labels)
        probes = _fit(train, each.num_classes, config.shots, on_batch)
        on_test[each.name] = _accuracies(probes, test)
        if config.choose_l2 == "test":
            to_choose.append(on_test[each.name])
        else:
            to_choose.append(_accuracies(probes, _no_shots(each.name, train, config)))
    chosen = [choose_l2(accuracies) for accuracies in np.stack(to_choose, axis=1)]
    return FewShotResult(config.shots, tuple(L2[i] for i in chosen), on_test)


def _fit(
    train: _Labelled, num_classes: int, shots: Sequence[int], on_fit: Callable[[], None]
) -> list[Probe]:
    """A probe for each number of shots."""
    place, probes = place_in_class(train.labels), []
    for count in shots:
        on_fit()
        used = place < count
        probes.append(fit(train.features[used], train.labels[used], num_classes))
    return probes


def _accuracies(probes: Sequence[Probe], images: _Labelled) -> Float[np.ndarray, "x l"]:
    """By probe and L2."""
    return np.array([[probe.accuracy(*images, l2) for l2 in L2] for probe in probes])


def _no_shots(name: str, train: _Labelled, config: FewShotConfig) -> _Labelled:
    """The training images that no probe is fitted to."""
    others = place_in_class(train.labels) >= max(config.shots)
    if not others.any():
        raise distributed.synchronized(
            UsageError(
                f"every training image of {name} is a shot, so none is left to choose the L2: use "
                "fewer shots, or choose_l2=test",
                **{"fewshot.shots": config.shots, "fewshot.choose_l2": config.choose_l2},
            )
        )
    return _Labelled(train.features[others], train.labels[others])


def _read(
    model: ViT,
    source: Source,
    labels: Int[np.ndarray, "b"],
    *,
    batch_size: int,
    on_batch: Callable[[], None],
    **reading: Any,
) -> _Labelled:
    """The features of the images that can be read, in order, on every process those of all."""
    placement = model.placement
    graph, state = nnx.split(model)
    features, read = [], []
    for batch in evaluation_batches(
        source,
        batch_size=placement.round_up(batch_size),
        shard=placement.process_shard(),
        **reading,
    ):
        on_batch()
        arrays = placement.make_global_array((batch.images, batch.valid))
        outputs, valid = jax.device_get(_features(graph, state, *arrays))
        features.append(outputs[valid])
        read.append(valid)
    in_order, indices = in_source_order(source, read)
    images = _Labelled(np.concatenate(features)[in_order], labels[indices])
    if count := int((~np.isfinite(images.features).all(axis=-1)).sum()):
        message = f"{count} of {len(images.labels)} images have features that are NaN or infinite"
        raise distributed.synchronized(Failure(f"{source.name}: {message}"))
    return images


def check_fewshot(model: ViT, config: FewShotConfig, preprocessing: Preprocessing) -> None:
    """Traces the program of ``fewshot``, which then need not trace it. Allocates no array.

    Args:
        model: its parameters may be ``jax.ShapeDtypeStruct``.
        preprocessing: the model's own.

    Raises:
        UsageError: the capacity leaves no slot.
    """
    b = model.placement.round_up(config.batch_size)
    batch = empty_batch(b, 1, config.prepare(preprocessing))
    jax.eval_shape(_features, *nnx.split(model), batch.images, batch.valid)


@functools.partial(jax.jit, static_argnums=0)
def _features(
    graph: nnx.GraphDef, state: nnx.State, images: Array, valid: Bool[Array, "b"]
) -> tuple[Float[Array, "b r"], Bool[Array, "b"]]:
    """The features of pixels in [0, 255], and which images are more than padding."""
    model = nnx.merge(graph, state)
    model.head.classes = None  # the head then returns its inputs
    features, _ = model.forward(to_float(images), valid=valid)
    return model.placement.replicate((features, valid))
