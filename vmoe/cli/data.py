"""The data that ``--data`` names, for commands that measure a trained model."""

from typing import TYPE_CHECKING, Union

from vmoe.config import DataConfig
from vmoe.errors import UsageError

if TYPE_CHECKING:
    from vmoe.checkpoints import StoredModel
    from vmoe.data.sources import Source
    from vmoe.factory import Loaded


def open_data(
    data: str, trained: Union["Loaded", "StoredModel"], *, split: str = "test"
) -> tuple["Source", bool]:
    """A split with the classes of a model, and whether unreadable images are left out.

    Args:
        data: NAME[:SPLIT]; the data set of the model's run if empty.
        split: if ``data`` names none.

    Raises:
        UsageError: there is no such data, or it has other classes.
    """
    from vmoe.data.sources import name_and_split, open_source, relabel

    if not data:
        if trained.train_config is None:
            raise UsageError("--data is missing: the checkpoint does not name its training data")
        data = trained.train_config.data.name
    name, named = name_and_split(data)
    reading = trained.train_config.data if trained.train_config else DataConfig()
    source = open_source(name, named or split, check=reading.check, on_error=reading.on_error)
    return relabel(source, trained.class_names), reading.on_error == "replace"
