"""A run from its first step, or from where it stopped, to its last."""

from pathlib import Path

import grain
import jax

from vmoe.checkpoints.run import Checkpoints
from vmoe.config import Train
from vmoe.data.pipeline import training_batches
from vmoe.data.sources import open_source
from vmoe.evaluate import Evaluation, evaluate
from vmoe.train.folder import claim
from vmoe.train.report import Report
from vmoe.train.step import Program, State, compile_program

VALIDATED = ("accuracy", "cross_entropy", "dropped")  # what stands in metrics.csv


def train(config: Train, workdir: str | Path) -> Evaluation:
    """Trains to the end and returns the last evaluation on the validation part.

    Everything of the run lies in the folder ``workdir``; called again with the same config it
    goes on from the newest checkpoint, and a finished run is only evaluated.

    Raises:
        UsageError: the folder belongs to another config, or the data does not fit the model.
    """
    workdir = Path(workdir)
    source = open_source(config.data.name, "train")
    validation = open_source(config.data.name, "validation")
    batches = training_batches(source, config)
    program = compile_program(config)
    # What cannot work is refused before anything is written.
    jax.eval_shape(program.step, jax.eval_shape(program.init), batches[0])
    claim(workdir, config, source.class_names)
    result = None
    with Checkpoints(workdir) as checkpoints:
        state = resume(program, checkpoints)
        start = int(state.step)
        ahead = batches[start : config.steps].to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)
        )
        with Report(workdir, config, start=start) as report:
            for step, batch in enumerate(ahead, start + 1):
                state, metrics = program.step(state, batch)
                report.step(step)
                last, more = step == config.steps, {}
                if last or step % config.evaluate_every == 0:
                    with report.aside(metrics):
                        result = evaluate(program.model(state), validation)
                    more = {f"validation_{k}": getattr(result, k) for k in VALIDATED}
                if more or step % config.log_every == 0:
                    report.metrics(step, metrics, **more)
                if last or step % config.checkpoint_every == 0:
                    checkpoints.save(step, state.params, (state.step, state.moments))
    return result or evaluate(program.model(state), validation)


def resume(program: Program, checkpoints: Checkpoints) -> State:
    """The state of the newest checkpoint; the first one where there is none."""
    state = program.init()
    if checkpoints.latest is None:
        return state
    found = checkpoints.restore(
        checkpoints.latest, params=state.params, training=(state.step, state.moments)
    )
    step, moments = found["training"]
    return State(step, found["params"], moments)
