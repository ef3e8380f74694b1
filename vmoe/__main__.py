"""The command line: one subcommand per verb, each a thin door to a room.

Exit status: 0 done; 2 wrong usage, with one line that says what to do instead; 1 the work failed,
with one line; 75 a signal stopped a run, everything is saved and the same line goes on; 130
interrupted elsewhere. ``--debug`` shows the traceback behind a line.
"""

import contextlib
import dataclasses
import io
import logging
import os
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from vmoe import config as configs
from vmoe.errors import OUT_OF_MEMORY, UsageError, VmoeError, unknown

if TYPE_CHECKING:
    from rich.table import Table

Door = TypeVar("Door")


@dataclasses.dataclass(frozen=True)
class TrainDoor:
    """Train a model. The same line again goes on where it stopped."""

    config: Path
    """Recipe: a Python file that defines `config = TrainConfig(...)`, or a run's config.json."""
    workdir: Path
    """Folder of the run: config, metrics, checkpoints."""
    run: Annotated[configs.TrainConfig, tyro.conf.arg(name="")]
    mesh: str = ""
    """Devices by axis, data=4,expert=8: experts are spread over the one, repeated along the other.
    As suits the model and the devices at hand if empty."""
    fsdp: bool = False
    """Split dense parameters and the optimiser's state over the data axis as well."""
    distributed: bool = False
    """This is one of several processes of the run, started by the same line: a cluster that JAX
    knows says which, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID do."""
    on_nan: Literal["stop", "rewind"] = "stop"
    """What a loss or gradient does that is NaN or infinite: end the run; or go back to the newest
    checkpoint and on past the batches that led there."""
    max_rewinds: int = 3
    """How often at most it goes back."""


@dataclasses.dataclass(frozen=True)
class EvaluateDoor:
    """Evaluate a trained model on the whole of a split, every image once."""

    checkpoint: Path
    """Run folder, or its checkpoints/STEP, checkpoints/best, checkpoints/last."""
    model: configs.ViTConfig
    data: str = ""
    """NAME[:SPLIT], such as folder:PATH:validation; the run's own data set if empty, its test
    part if no split is named."""
    batch_size: int = 256
    image_size: int | None = None
    """Side to which images are resized, in pixels; as trained if None. Positions are resampled."""
    use_ema: bool = True
    """Take the moving average of the parameters where the run kept one."""
    per_class: bool = False
    """Add the accuracy of each class, and what its images were taken for."""
    json: bool = False
    """Print one JSON object and nothing else."""
    csv: Path | None = None
    """Append a row with figures, settings and versions to this file."""


@dataclasses.dataclass(frozen=True)
class PredictDoor:
    """Name what image files show, and which experts their patches used."""

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files, folders of them, patterns such as 'photos/**/*.jpg'."""
    checkpoint: Path
    """Run folder, or its checkpoints/STEP, checkpoints/best, checkpoints/last."""
    top: int = 5
    """How many classes to name."""
    use_ema: bool = True
    """Take the moving average of the parameters where the run kept one."""
    json: bool = False
    """Print one JSON list and nothing else."""


@dataclasses.dataclass(frozen=True)
class ModelsDoor:
    """List named models: parameters, active parameters per token, FLOPs per image."""

    pattern: tyro.conf.Positional[str] = "*"
    """Wildcards: 'vmoe_*'."""
    json: bool = False
    """Print one JSON list and nothing else."""


@dataclasses.dataclass(frozen=True)
class SummaryDoor:
    """What a named model is and costs; any of its fields may be changed."""

    name: tyro.conf.Positional[str]
    """One of `vmoe models`."""
    model: Annotated[configs.ViTConfig, tyro.conf.arg(name="")]
    json: bool = False
    """Print one JSON object and nothing else."""


@dataclasses.dataclass(frozen=True)
class ConfigDoor:
    """Print a recipe as it would run, as JSON."""

    config: Path
    """Recipe: a Python file that defines `config = TrainConfig(...)`, or a run's config.json."""
    run: Annotated[configs.TrainConfig, tyro.conf.arg(name="")]


@dataclasses.dataclass(frozen=True)
class PlanDoor:
    """What a recipe needs on devices that are not here: memory, messages, time of a step."""

    config: Path
    """Recipe: a Python file that defines `config = TrainConfig(...)`, or a run's config.json."""
    devices: int
    """How many, as JAX counts them."""
    run: Annotated[configs.TrainConfig, tyro.conf.arg(name="")]
    mesh: str = ""
    """Devices by axis, data=4,expert=8; all that the model and the devices allow if empty."""
    chip: str = "h100"
    """Whose published figures are taken: tpu_v3, tpu_v4, tpu_v5e, tpu_v5p, a100, h100, h200."""
    device_memory: str = ""
    """Of one device, 80GB or 80GiB; the chip's if empty."""
    json: bool = False
    """Print one JSON object and nothing else."""


def train(argv: Sequence[str]) -> None:
    path = _peek(argv, "--config")
    _peek(argv, "--workdir")  # an empty one would be the folder we are in
    door = _parse(
        TrainDoor, "train", argv, run=configs.load(path) if path else configs.TrainConfig()
    )
    from vmoe import distributed
    from vmoe.train.loop import train

    if door.distributed:
        distributed.initialize()
    with distributed.abort_on_error():
        done = train(
            door.run,
            door.workdir,
            mesh=door.mesh,
            fsdp=door.fsdp,
            on_nan=door.on_nan,
            max_rewinds=door.max_rewinds,
        )
    if not distributed.is_primary():
        return
    for name, weights, found in done:
        print(
            f"{door.workdir}: {door.run.steps} steps, {name} accuracy {found.accuracy:.2%} on "
            f"{found.images} images{' (average)' if weights == 'ema' else ''}"
        )


def evaluate(argv: Sequence[str]) -> None:
    path = _peek(argv, "--checkpoint")
    run = _run_of(path) if path else configs.TrainConfig()
    door = _parse(EvaluateDoor, "evaluate", argv, model=run.model)
    _check_effect(run.model, door.model)
    from vmoe.data.sources import name_and_split, open_source, relabel
    from vmoe.evaluate import evaluate
    from vmoe.evaluate.table import append_row, check_file, per_class, summary
    from vmoe.factory import class_names, load_step

    name, split = name_and_split(door.data or run.data.name)
    source = relabel(open_source(name, split or "test"), class_names(door.checkpoint))
    if door.csv:
        check_file(door.csv)
    model, step = load_step(door.checkpoint, door.model, use_ema=door.use_ema)
    weights = "ema" if door.use_ema and run.ema_decay else "raw"
    with _progress(source.name, -(-len(source) // max(door.batch_size, 1))) as each:
        found = evaluate(
            model, source, batch_size=door.batch_size, image_size=door.image_size, each=each
        )
    if door.csv:
        append_row(door.csv, door.checkpoint, step, model, found, seed=run.seed, weights=weights)
    if source.skipped:
        print(f"{source.name}: {source.skipped} files are no images, left out", file=sys.stderr)
    if door.json:
        extra = {"per_class": per_class(found)} if door.per_class else {}
        return _print_json({"step": step, "weights": weights} | found.figures() | extra)
    table = _table("", "")
    for row in summary(found):
        table.add_row(*row)
    average = " (moving average)" if weights == "ema" else ""
    _print(table, f"{door.checkpoint}, step {step}{average}, on {found.data}")
    if door.per_class:
        table = _table("class", "images", "accuracy", "most often taken for")
        for name, row in per_class(found).items():
            others = ", ".join(f"{k} ({v})" for k, v in list(row["confused_with"].items())[:3])
            table.add_row(name, f"{row['images']:,}", f"{row['accuracy']:.2%}", others)
        _print(table)


def _check_effect(trained: configs.ViTConfig, asked: configs.ViTConfig) -> None:
    """Refuses what was asked for and would change nothing."""
    if not trained.sparse_blocks and asked.moe != trained.moe:
        raise UsageError("--model.moe: no block of this model is sparse, leave these options out")
    for block in asked.sparse_blocks:
        there, here = trained.moe_of(block), asked.moe_of(block)
        if there is None or there.capacity_factor == here.capacity_factor:
            continue
        if here.dropless:
            raise UsageError(
                "--model.moe.capacity-factor with dropless, which has no capacity: add "
                "--model.moe.no-dropless, or leave it out"
            )
        if here.capacity is not None:
            raise UsageError(
                f"--model.moe.capacity-factor with capacity={here.capacity}, which overrides it: "
                "add --model.moe.capacity None, or leave it out"
            )


def predict(argv: Sequence[str]) -> None:
    if "" in argv:
        raise UsageError("an empty word among the images; '.' is this folder")
    door = _parse(PredictDoor, "predict", argv)
    from vmoe.evaluate import image_files, predict
    from vmoe.factory import class_names, load

    paths, skipped = image_files(door.images)
    names = class_names(door.checkpoint)
    predictions = predict(load(door.checkpoint, use_ema=door.use_ema), paths, names, top=door.top)
    if skipped:
        print(f"{skipped} files are no images, left out", file=sys.stderr)
    if door.json:
        return _print_json([dataclasses.asdict(prediction) for prediction in predictions])
    for prediction in predictions:
        table = _table("class", "probability")
        for name, probability in zip(prediction.classes, prediction.probabilities, strict=True):
            table.add_row(name, f"{probability:.1%}")
        _print(table, prediction.path)
        if prediction.experts:
            experts = range(max(map(len, prediction.experts.values())))
            table = _table("block", *(f"e{i}" for i in experts))
            for block, shares in prediction.experts.items():
                table.add_row(str(block), *(f"{share:.0%}" for share in shares))
            _print(
                table, "share of each expert in what its tokens sent to experts, by sparse block"
            )


def models(argv: Sequence[str]) -> None:
    door = _parse(ModelsDoor, "models", argv)
    from vmoe.costs.flops import cost
    from vmoe.models import list_models, model_config

    names = list_models(door.pattern)
    if not names:
        raise UsageError(f"no model matches {door.pattern!r}; `vmoe models` lists all")
    costs = {name: cost(model_config(name)) for name in names}
    if door.json:
        return _print_json([{"name": n} | dataclasses.asdict(c) for n, c in costs.items()])
    table = _table("model", "parameters", "active per token", "GFLOPs per image")
    for name, found in costs.items():
        parameters, active = (f"{found.parameters:,}", f"{found.active_parameters:,.0f}")
        table.add_row(name, parameters, active, f"{found.flops_per_image / 1e9:.4g}")
    _print(table)


def summary(argv: Sequence[str]) -> None:
    from vmoe.models import MODELS, model_config

    words = [word for word in argv if not word.startswith("-")]
    name = next((word for word in words if word in MODELS), words[0] if words else "")
    default = model_config(name) if name else configs.ViTConfig()
    door = _parse(SummaryDoor, "summary", argv, model=default)
    from vmoe.costs.flops import cost
    from vmoe.costs.summary import summarize

    if door.json:
        found = dataclasses.asdict(cost(door.model)) | dataclasses.asdict(door.model)
        return _print_json({"name": door.name} | found)
    print(summarize(door.model, title=door.name))


def config(argv: Sequence[str]) -> None:
    path = _peek(argv, "--config")
    door = _parse(
        ConfigDoor, "config", argv, run=configs.load(path) if path else configs.TrainConfig()
    )
    print(configs.to_json(door.run))


def plan(argv: Sequence[str]) -> None:
    path = _peek(argv, "--config")
    door = _parse(PlanDoor, "plan", argv, run=configs.load(path) if path else configs.TrainConfig())
    from vmoe.plan import table as rows
    from vmoe.plan.candidates import plan

    found = plan(
        door.run, door.devices, mesh=door.mesh, chip=door.chip, device_memory=door.device_memory
    )
    if door.json:
        return _print_json(rows.to_dict(found))
    print("\n".join(rows.heading(found)))
    for title, columns, table in rows.tables(found):
        _print(_filled(_table(*columns), table), f"\n{title}")
    print("\nWhat this rests on:")
    for line in rows.assumptions(found):
        print(textwrap.fill(line, 100, initial_indent="- ", subsequent_indent="  "))


VERBS: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "train": (train, "train a model; the same line again goes on where it stopped"),
    "evaluate": (evaluate, "a trained model on the whole of a split"),
    "predict": (predict, "name what image files show, and the experts used"),
    "models": (models, "list the named models and what they cost"),
    "summary": (summary, "what one model is and costs"),
    "config": (config, "print a recipe as it would run"),
    "plan": (plan, "memory, messages and time of a step on devices that are not here"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the exit status."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if debug := "--debug" in argv:
        argv.remove("--debug")
    else:
        _quiet()
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_overview())
            return 0
        if argv[0] not in VERBS:
            raise UsageError(unknown("no verb", argv[0], list(VERBS)))
        VERBS[argv[0]][0](argv[1:])
    except BrokenPipeError:  # whoever read what is printed has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (VmoeError, OSError, MemoryError, RuntimeError, KeyboardInterrupt) as error:
        line, status = _foreseen(error)
        if not line:
            raise
        if debug:
            traceback.print_exc()
        print(f"vmoe: {line}", file=sys.stderr)
        return status
    return 0


def _foreseen(error: BaseException) -> tuple[str, int]:
    """One line for an error that is nobody's bug, and the exit status; no line for others."""
    match error:
        case VmoeError():
            return str(error), error.status
        case OSError() if error.errno is not None:
            return f"{error.filename or 'the work'}: {error.strerror}", 1
        case KeyboardInterrupt():
            return "interrupted", 130
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return OUT_OF_MEMORY, 1
    return "", 1


def _quiet() -> None:
    """Keeps what libraries say of an error in their threads off the screen: one line tells it."""
    logging.disable(logging.ERROR)
    sys.unraisablehook = lambda _: None


def _run_of(checkpoint: str) -> configs.TrainConfig:
    from vmoe.checkpoints.run import find
    from vmoe.workdir.layout import read_config

    return read_config(find(checkpoint)[0])


def _table(*columns: str) -> "Table":
    """A table whose first column holds names and all others figures."""
    from rich.table import Table

    table = Table(show_header=any(columns))
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    return table


def _filled(table: "Table", rows: list[tuple[str, ...]]) -> "Table":
    for row in rows:
        table.add_row(*row)
    return table


def _print(table: "Table", title: str = "") -> None:
    from rich.console import Console

    if title:
        print(title)
    known = sys.stdout.isatty() or "COLUMNS" in os.environ
    Console(markup=False, width=None if known else 120).print(table)


@contextlib.contextmanager
def _progress(what: str, batches: int) -> Iterator[Callable[[], None]]:
    """A live bar on a terminal, gone afterwards; what to call before each batch."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=batches)
        yield lambda: progress.advance(task)


def _print_json(value: Any) -> None:
    import json

    print(json.dumps(value))


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  vmoe {verb:<{width}}  {what}" for verb, (_, what) in VERBS.items()]
    return "\n".join(
        [
            "Vision Mixture-of-Experts.",
            "",
            *lines,
            "",
            "vmoe VERB --help tells more; --debug shows the traceback of an error.",
        ]
    )


def _parse(kind: type[Door], verb: str, argv: Sequence[str], **defaults: Any) -> Door:
    """A door from the words behind its verb; what is not given comes from the defaults."""
    missing = {
        field.name: tyro.MISSING
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING
    }
    default = kind(**missing | defaults)
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            return tyro.cli(
                kind,
                prog=f"vmoe {verb}",
                args=argv,
                default=default,
                config=(tyro.conf.AvoidSubcommands,),
            )
        except SystemExit as stop:
            if stop.code == 0:  # --help
                raise
    raise UsageError(_one_line(told.getvalue()) + f" (vmoe {verb} --help lists all)")


def _one_line(box: str) -> str:
    """The text of a box drawn around a message, without its last part, which names --help."""
    lines = [line.strip("│╭╮╰╯─ ") for line in box.splitlines()[1:]]
    text = " ".join(line for line in lines if line)
    return text.partition(" For full helptext")[0]


def _peek(argv: Sequence[str], option: str) -> str | None:
    """The value of an option that decides the defaults of all others, or names a place.

    Raises:
        UsageError: it is empty.
    """
    found = None
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == option:
            found = following
        if word.startswith(option + "="):
            found = word.partition("=")[2]
    if found == "":
        raise UsageError(f"{option} is empty")
    return found


if __name__ == "__main__":
    sys.exit(main())
