"""What a run says before its first step."""

from collections.abc import Iterator, Sequence

import jax

from vmoe.config import EvalConfig, TrainConfig
from vmoe.data.crops import resizing_messages
from vmoe.data.sources import Source, skipped_messages
from vmoe.evaluate.fewshot_data import FewShotData
from vmoe.sharding import Placement
from vmoe.train.init import Init, messages
from vmoe.train.lr_factors import Params, training_messages


def first_messages(
    config: TrainConfig,
    placement: Placement,
    source: Source,
    evaluations: list[tuple[EvalConfig, Source]],
    fewshot: Sequence[FewShotData],
    initial: Init | None,
    params: Params,
) -> Iterator[str]:
    """Messages to log before the first step."""
    size = config.model.image_size
    sets = ", ".join(f"{len(each):,} {evaluation.name}" for evaluation, each in evaluations)
    yield (
        f"{len(source):,} images of {len(source.class_names)} classes "
        f"({config.model.num_classes} logits), resized to {size} px; {sets}"
    )
    if initial is not None:
        yield from messages(initial, source.class_names)
    yield from training_messages(config.optim, params)
    if placement.mesh is not None:
        share = config.batch_size // placement.devices
        yield (
            f"mesh {placement}: {placement.devices} devices, {jax.process_count()} processes; "
            f"each device has {share} images and forms groups among them"
        )
    if config.accumulate > 1:
        part = config.batch_size // config.accumulate
        yield (
            f"accumulate={config.accumulate}: parts of {part} images, one after another; groups "
            "are formed within a part"
        )
    logits, classes = config.model.num_classes, len(source.class_names)
    if logits > classes:
        yield f"the model has {logits} logits for {classes} classes; {logits - classes} are unused"
    yield from resizing_messages(source, size)
    probed = [own for each in fewshot for own in each.sources]
    yield from skipped_messages([source, *(each for _, each in evaluations), *probed])
    for each in fewshot:
        yield from each.messages
