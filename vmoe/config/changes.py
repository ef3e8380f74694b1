"""What may change in the config of a run that is resumed, and what that does to its numbers."""

import dataclasses
import re
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from vmoe.config.train import TrainConfig

GROUPS = "where choices are dropped, later results are with other groups than earlier ones"
ROUNDING = "the same steps may round differently"
SENT = f"dropout, and what a bounded buffer drops, may differ; else {ROUNDING}"
CHOSEN = "one L2 is chosen for all of them, so accuracies before and after may differ"
UNREADABLE = "images that cannot be read are treated so from now on"
MAY_CHANGE = {
    "log_every": "",
    "evaluate_every": "",
    "checkpoint_every": "",
    "keep_latest": "",
    "evaluations": "",
    "evaluations.batch_size": GROUPS,
    "evaluations.data": "",
    "fewshot": "",
    "fewshot.every": "",
    "fewshot.batch_size": GROUPS,
    "data.name": "",
    "data.num_workers": "",
    "data.check": "",
    "data.on_error": UNREADABLE,
    "data.max_pixels": UNREADABLE,
    "accumulate": f"groups, noise, dropout and losses may be of a part of a batch; else {ROUNDING}",
    "model.remat": ROUNDING,
    "model.moe.exchange.hot_experts": SENT,
    "model.moe.exchange.chunks": SENT,
    "model.moe.exchange.ragged": SENT,
}
"""The fields that may change, without the numbers of evaluation sets, and what the change does to
the numbers of the run: if empty, nothing, it ends with bitwise the same parameters. All other
fields decide the numbers; only the length may grow."""
OF_IMAGES = ("data.name", "evaluations.data")
"""Those that may change only if the images stay the same, as after they were moved."""


class Change(NamedTuple):
    """A field that differs between two configs.

    Attributes:
        field: such as "evaluations.0.batch_size"; for an evaluation set that only one of the
            configs has, "evaluations"; for the few-shot sets, "fewshot".
        before: its value before; for such a set its name, or None; the names of few-shot sets.
        now: its value now.
    """

    field: str
    before: Any
    now: Any

    @property
    def key(self) -> str:
        """The field as in ``MAY_CHANGE``."""
        return re.sub(r"\.\d+", "", self.field)

    def __str__(self) -> str:
        if self.field == "evaluations":
            return f"set {self.before or self.now!r} is {'added' if self.now else 'left out'}"
        if self.field == "fewshot":
            names = [", ".join(each) or "none" for each in (self.before, self.now)]
            line = f"few-shot sets {names[0]} -> {names[1]}"
            return line + f": {CHOSEN}" * bool(self.before and self.now)
        effect = "the same images" if self.key in OF_IMAGES else MAY_CHANGE.get(self.key)
        return f"{self.field} {self.before} -> {self.now}" + (f": {effect}" if effect else "")


def changes(stored: TrainConfig, current: TrainConfig) -> list[Change]:
    """The fields that differ, but for the length; evaluation sets are compared by name.

    The first set stays the first, since it decides which checkpoint is the best.
    """
    before, now = ({each.name: each for each in x.evaluations} for x in (stored, current))
    found = [
        *(Change("evaluations", name, None) for name in before if name not in now),
        *(Change("evaluations", None, name) for name in now if name not in before),
    ]
    first = stored.evaluations[0].name, current.evaluations[0].name
    if first[0] != first[1]:
        found.append(Change("evaluations.0.name", *first))
    for i, name in enumerate(now):
        if name in before:
            found += _differences(before[name], now[name], f"evaluations.{i}")
    sets = stored.fewshot.data, current.fewshot.data
    if {*sets[0]} != {*sets[1]}:
        found.append(Change("fewshot", *sets))
    if bool(sets[0]) == bool(sets[1]):
        found += _differences(stored.fewshot, current.fewshot, "fewshot", ["data"])
    return [*found, *_differences(stored, current, "", ["evaluations", "fewshot", "steps"])]


def _differences(
    stored: Any, current: Any, place: str, skip: Collection[str] = ()
) -> Iterator[Change]:
    if dataclasses.is_dataclass(stored) and type(stored) is type(current):
        names = [each.name for each in dataclasses.fields(stored) if each.name not in skip]
        pairs = {name: (getattr(stored, name), getattr(current, name)) for name in names}
    elif isinstance(stored, tuple) and isinstance(current, tuple) and len(stored) == len(current):
        pairs = {str(i): pair for i, pair in enumerate(zip(stored, current, strict=True))}
    else:
        if stored != current:
            yield Change(place, stored, current)
        return
    for name, pair in pairs.items():
        yield from _differences(*pair, f"{place}.{name}".lstrip("."))
