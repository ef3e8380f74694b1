"""Weights & Biases: the scalars and pictures of a run, in addition to its files."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vmoe import distributed
from vmoe.checkpoints.restore import has_checkpoint
from vmoe.config import TrainConfig
from vmoe.config.files import to_json
from vmoe.errors import Failure, Stopped, UsageError, VmoeError, parse_json
from vmoe.host.retry import failure, retried
from vmoe.train.sinks import Entry, Sink
from vmoe.workdir.layout import replace_text

FILE = "wandb.json"  # in the run folder: the id and the project of the W&B run
WITHOUT_LOGIN = ("offline", "dryrun", "disabled")  # values of WANDB_MODE
FINISH_TIMEOUT = 300  # seconds to wait for uploads at the end


def check_wandb(workdir: Path, project: str) -> None:
    """Checks, in the primary process, that a run can be logged; needs no network.

    Args:
        project: empty for the project of the run folder, or the default.

    Raises:
        UsageError: wandb is not installed or not logged in, or the run has a checkpoint and is
            in another project.
    """
    if not distributed.is_primary():
        return
    stored = _stored(workdir)
    try:
        import wandb
    except ImportError as error:
        raise UsageError(f"wandb: {error}; pip install 'vmoe[wandb]'") from None
    if stored and project not in ("", stored["project"]) and has_checkpoint(workdir):
        raise UsageError(
            f"the run in {workdir} is in the project {stored['project']}; use that, or another "
            "workdir",
            wandb=project,
        ).remedied_by(workdir=None)
    mode = wandb.setup(wandb.Settings(silent=True)).settings.mode
    if mode not in WITHOUT_LOGIN and not wandb.login(prompt=False, verify=False):
        raise UsageError("wandb: not logged in; run `wandb login`, or set WANDB_MODE=offline")


class WandbRun(Sink):
    """One W&B run, which ends with the exit status of the run.

    A run that is resumed continues the same W&B run. The horizontal axis is the metric ``step``: a
    step that is computed again after a kill is logged again, with equal values. Errors after the
    start are logged once and end the logging, not the run.

    Args:
        project: empty for the project of the run folder, ``WANDB_PROJECT``, or "vmoe".
        log: prints a line.

    Raises:
        Failure: the W&B run cannot be started.
    """

    def __init__(
        self, workdir: Path, config: TrainConfig, project: str, log: Callable[[str], None]
    ) -> None:
        import wandb

        self._wandb, self._log = wandb, log
        default = {
            "id": secrets.token_hex(4),
            "project": project or os.environ.get("WANDB_PROJECT", "vmoe"),
        }
        stored = _stored(workdir)
        identity = stored if stored and project in ("", stored["project"]) else default
        replace_text(workdir / FILE, json.dumps(identity) + "\n")
        try:
            self._run: Any = wandb.init(
                **identity,
                resume="allow",
                dir=workdir,
                name=workdir.resolve().name,
                config=json.loads(to_json(config)),
                settings=wandb.Settings(
                    silent=True,
                    console="off",
                    finish_timeout=FINISH_TIMEOUT,
                    finish_timeout_raises=True,
                ),
            )
        except Exception as error:  # many types: network, login, settings, W&B's process
            raise Failure(
                f"wandb: {' '.join(str(error).split())}; without a network set WANDB_MODE=offline"
            ) from None
        self._run.define_metric("*", step_metric="step")
        self._place = f"`wandb sync {Path(self._run.dir).parent}` uploads it"
        self._url = "" if self._run.offline else self._run.url or ""  # empty: nothing is uploaded
        self._log(f"wandb: {self._url or f'offline; {self._place}'}")

    def write(self, step: int, entries: Sequence[Entry]) -> None:
        """Logs scalars and pictures of one step, by tag."""
        for entry in entries:
            if self._run and (entry.scalars or entry.pictures):
                with self._errors():
                    pictures = {tag: self._wandb.Image(p) for tag, p in entry.pictures.items()}
                    self._run.log({"step": step, **entry.scalars, **pictures})

    def close(self, error: BaseException | None) -> None:
        """Ends the W&B run with the exit status of the error."""
        if not self._run:
            return
        if self._url:
            self._log(f"wandb: uploading the rest, for at most {FINISH_TIMEOUT} s")
        with self._errors():
            if isinstance(error, Stopped):
                self._run.mark_preempting()
            status = error.status if isinstance(error, VmoeError) else int(error is not None)
            self._run.finish(exit_code=status)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Logs an error of W&B, and ends the logging."""
        try:
            yield
        except (OSError, self._wandb.Error) as error:
            self._run = None
            self._log(f"wandb: {error}; nothing more is logged there; {self._place}")


def _stored(workdir: Path) -> dict[str, str] | None:
    """The id and the project of the W&B run; None if there is none."""
    path = workdir / FILE
    try:
        stored = parse_json(retried(path, path.read_bytes))
        return {name: str(stored[name]) for name in ("id", "project")}
    except FileNotFoundError:
        return None
    except OSError as error:
        raise failure(path, error) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: {type(error).__name__}: {error}; delete it to start another W&B run"
        ) from None
