"""Evaluations and few-shot probes during a run; a signal interrupts them."""

import contextlib
from collections.abc import Iterator

from vmoe import distributed, models
from vmoe.errors import OUT_OF_MEMORY, Failure, is_out_of_memory
from vmoe.evaluate import NamedEvaluation, evaluate
from vmoe.evaluate.fewshot import fewshot
from vmoe.train.batches import (
    Interrupted,
    reading,
    reading_together,
    warn_of_images,
)
from vmoe.train.entries import fewshot_entry
from vmoe.train.pictures import sheet, worst_errors
from vmoe.train.setup import Run
from vmoe.train.sinks import Entry
from vmoe.train.state import State
from vmoe.train.status import StepStatus


def evaluate_all(
    run: Run, state: State, step: int, status: StepStatus
) -> list[NamedEvaluation] | None:
    """Evaluates every set, with the parameters and, if the run has it, with their moving average.

    Returns:
        the evaluations; an empty list if the step's evaluations are already written; None if a
        signal interrupted them, so that they are due again on resume.
    """
    written = distributed.any_process(run.report.has("evaluations.csv", step))
    if written and step < run.config.total_steps:
        return []
    try:
        evaluations = list(_evaluations(run, state))
    except Interrupted:
        status.stop = True
        return None
    if not written:
        first = [each for each in evaluations if each.set == evaluations[0].set]
        run.checkpoints.record(step, {"accuracy": first[-1].result.accuracy})
        with run.report.measure("reporting"):
            run.report.evaluations(step, evaluations)
        if distributed.is_primary():
            with run.report.measure("pause"), contextlib.suppress(Interrupted):  # rows are written
                _show_worst_errors(run, step, evaluations)
    return evaluations


def _evaluations(run: Run, state: State) -> Iterator[NamedEvaluation]:
    for i, (evaluation, source) in enumerate(run.data.evaluations):
        model = evaluation.model(run.config.model)
        for weights, params in (("raw", state.params), ("ema", state.ema)):
            if params is None:
                continue
            how = reading_together(run, evaluation.batch_size)
            how.on_batch()  # a signal ends this before anything is compiled
            with (
                _naming_batch(f"evaluations.{i}.batch_size", evaluation.batch_size),
                run.report.pause_timer(f"evaluating {evaluation.name}", compiles=True),
            ):
                result = evaluate(
                    models.with_params(model, params, placement=run.program.placement),
                    source,
                    how,
                    preprocessing=evaluation.prepare(run.config.data, model),
                    loss=run.config.loss,
                )
            warn_of_images(run)
            yield NamedEvaluation(evaluation.name, weights, result)


@contextlib.contextmanager
def _naming_batch(field: str, size: int) -> Iterator[None]:
    """Names the batch size if memory runs out: the settings of the training step do not help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise Failure(f"{field}={size}: {OUT_OF_MEMORY}; use a smaller one") from error


def _show_worst_errors(run: Run, step: int, evaluations: list[NamedEvaluation]) -> None:
    """Shows the worst errors of each set, by the moving average of the parameters if it exists."""
    last = {each.set: each for each in evaluations}
    for config, source in run.data.evaluations:
        name, weights, result = last[config.name]
        tiles = worst_errors(
            result,
            source,
            config.prepare(run.config.data, run.config.model),
            reading(run),
        )
        if tiles:
            picture = {f"{name}_{weights}/worst_errors": sheet(tiles)}
            run.report.write(step, Entry(pictures=picture))


def probe(run: Run, state: State, step: int, status: StepStatus) -> None:
    """Runs few-shot probes, unless the probes of the step are already written.

    A signal interrupts them, so that they are due again on resume.
    """
    if distributed.any_process(run.report.has("fewshot.csv", step)):
        return
    weights, params = ("raw", state.params) if state.ema is None else ("ema", state.ema)
    model = models.with_params(run.config.model, params, placement=run.program.placement)
    try:
        with (
            _naming_batch("fewshot.batch_size", run.config.fewshot.batch_size),
            run.report.pause_timer("few-shot probes", compiles=True),
        ):
            result = fewshot(
                model,
                run.data.fewshot,
                run.config.fewshot,
                run.config.preprocessing,
                reading_together(run, run.config.fewshot.batch_size),
            )
    except Interrupted:
        status.stop = True
        return
    warn_of_images(run)
    with run.report.measure("reporting"):
        run.report.write(step, fewshot_entry(weights, result))
