"""The batches of a run: how the loop waits for them, and how a signal ends the wait."""

import dataclasses
import functools
from collections.abc import Callable

import jax

from vmoe import distributed
from vmoe.config import TrainConfig, replace
from vmoe.data.pipeline import Batch, Read
from vmoe.data.reading import Reader, Reading, read_ahead, wait_message
from vmoe.sharding import Placement
from vmoe.train.pictures import examples, sheet
from vmoe.train.setup import Run
from vmoe.train.sinks import Entry, write_errors
from vmoe.train.state import State
from vmoe.train.step import OF_NO_STEP, Inputs, make_inputs, step_key


class Interrupted(Exception):
    """A signal requested a stop: every process ends the evaluation, or the wait for data."""


def open_reader(run: Run, state: State) -> Reader[Read]:
    """Reads the batches of the remaining steps."""
    start, count = int(state.batch), run.config.total_steps - int(state.step)
    return read_ahead(run.program.batches, start, count, run.workers, on_wait=on_wait(run))


def next_batch(run: Run, reader: Reader[Read], step: int) -> Batch | None:
    """The batch of a step, on its way to the devices; None if a signal ended the wait for it."""
    run.profiler.start(step)
    try:
        with run.report.measure("data"):
            read = next(reader)
    except Interrupted:
        return None
    for reason in read.unreadable:
        run.replaced.add(reason)
    run.refused.add(read.refused)
    return run.program.placement.make_global_array(read.batch)


def warn_of_images(run: Run) -> None:
    """Prints the images that were replaced, left out or decoded exactly since the last call.

    The primary process lists those of all processes; every process has to call this.
    """
    lines = run.refused.news()
    for images in (run.replaced, run.left_out):
        for reasons in distributed.gather("\n".join(images.new)):
            for reason in reasons.splitlines():
                images.add(reason)
        with write_errors(run.workdir):
            news = images.news()
        lines += news if distributed.is_primary() else []
    for line in lines:
        run.report.warn(line)


def show_examples(run: Run, step: int, batch: Batch, number: int) -> None:
    """Shows the inputs that the step made from a batch, on the first device of a process.

    Args:
        number: number of the batch.
    """
    config = replace(run.config, **OF_NO_STEP)  # so that a run that is resumed compiles nothing
    with run.report.measure("pause"):
        made = _inputs(batch, jax.device_put(number), config, run.program.placement)
        images, targets, _ = jax.device_get([x.addressable_data(0) for x in made])
        if distributed.is_primary():
            picture = sheet(examples(images, targets, run.data.source.class_names))
            run.report.write(step, Entry(pictures={"train/examples": picture}))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _inputs(batch: Batch, number: jax.Array, config: TrainConfig, placement: Placement) -> Inputs:
    return make_inputs(batch, step_key(config, number), config, placement)


def must_stop(run: Run) -> bool:
    """Whether a signal stops the run now; several processes agree on it after a step."""
    return distributed.is_single_process() and bool(run.signals.requested)


def on_wait(run: Run) -> Callable[[int], None]:
    """The function to call every second of a wait for data: reports it, or ends it on a signal."""

    def show(seconds: int) -> None:
        if must_stop(run):
            raise Interrupted
        if message := wait_message(seconds):
            run.report.warn(message)

    return show


def reading(run: Run, batch_size: int = 1) -> Reading:
    """How one process reads images in its threads; a signal ends the wait for them."""
    add = run.left_out.add if run.config.data.on_error == "replace" else None
    return Reading(batch_size, on_unreadable=add, on_wait=on_wait(run))


def reading_together(run: Run, batch_size: int) -> Reading:
    """How all processes read images, by workers; a signal to one ends the pass in all."""

    def check_signals() -> None:
        if distributed.any_process(bool(run.signals.requested)):
            raise Interrupted

    one = reading(run, batch_size)
    return dataclasses.replace(one, workers=run.workers, on_batch=check_signals)
