"""Reads and writes inference.json, the routing at inference that ``vmoe capacity`` chose."""

from pathlib import Path

from vmoe.config.inference import Inference, inference_from_json, inference_to_json
from vmoe.errors import UsageError, writing
from vmoe.retry import retried
from vmoe.workdir.layout import replace_text

INFERENCE = "inference.json"


def read_inference(path: Path) -> Inference:
    """The content of an inference.json.

    Raises:
        UsageError: it is missing, corrupt or of another format version.
        Failure: it cannot be read for a reason that can pass.
    """
    try:
        return inference_from_json(retried(path, lambda: path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except (UsageError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: {error}") from None


def write_inference(path: Path, inference: Inference) -> None:
    """Writes an inference.json; a kill leaves either the old or the new content.

    Raises:
        Failure: it cannot be written.
    """
    with writing(path):
        replace_text(path, inference_to_json(inference) + "\n")
