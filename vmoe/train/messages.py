"""What a run says before its first step."""

from collections.abc import Iterator

import jax

from vmoe.data.crops import resizing_messages
from vmoe.data.sources import skipped_messages
from vmoe.train.check import Checked
from vmoe.train.init import messages
from vmoe.train.lr_factors import training_messages


def first_messages(run: Checked) -> Iterator[str]:
    """Messages to log before the first step."""
    config, source, placement = run.config, run.source, run.placement
    size, classes = config.model.image_size, len(source.class_names)
    sets = ", ".join(f"{len(each):,} {evaluation.name}" for evaluation, each in run.evaluations)
    yield (
        f"{len(source):,} images of {classes} classes "
        f"({config.model.num_classes} logits), resized to {size} px; {sets}"
    )
    if run.initial is not None:
        yield from messages(run.initial, source.class_names)
    yield from training_messages(config.optim, run.abstract_state.params)
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
    logits = config.model.num_classes
    if logits > classes:
        yield f"the model has {logits} logits for {classes} classes; {logits - classes} are unused"
    yield from resizing_messages(source, size)
    probed = [own for each in run.fewshot for own in each.sources]
    yield from skipped_messages([source, *(each for _, each in run.evaluations), *probed])
    for each in run.fewshot:
        yield from each.messages
