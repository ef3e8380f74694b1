"""Loads a model with the routing that ``vmoe capacity`` chose, and prints a note."""

from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.cli.printing import print_messages
from vmoe.config import RoutingOverrides

if TYPE_CHECKING:
    from vmoe.factory import Loaded

UNITS = {"flops": "FLOPs", "time": "time"}
AS_TRAINED = "none"  # the value of --routing-file for no file


def load_with_routing(
    checkpoint: Path, routing_file: str, *, routing: RoutingOverrides | None = None, use_ema: bool
) -> "Loaded":
    """The model of ``vmoe.load``.

    Args:
        routing_file: a file; "none"; or empty for the file in the run folder, if there is one and
            no routing is given.
    """
    from vmoe.data.pipeline import ORDER
    from vmoe.factory import load
    from vmoe.workdir.routing_file import OLDER_NAME, ROUTING_FILE

    unchanged = routing in (None, RoutingOverrides())
    file = {"": unchanged, AS_TRAINED: False}.get(routing_file, routing_file)
    loaded = load(checkpoint, routing=routing, use_ema=use_ema, routing_file=file)
    if loaded.routing_file:
        path, chosen = loaded.routing_file
        other = chosen.step != loaded.step and None not in (chosen.step, loaded.step)
        step = f", at step {chosen.step} of training" if other else ""
        cost = f"{chosen.cost:.3g}x the {UNITS[chosen.by]}"
        line = f"routing of {path}: {cost}, chosen on {chosen.data}"
        lines = [f"{line}{step} (--routing-file none turns it off)"]
        if chosen.order != ORDER:
            lines.append(
                f"{path}: its accuracies are of images in another order ({chosen.order}; now "
                f"{ORDER}): run vmoe capacity again to measure them"
            )
        if path.name == OLDER_NAME:
            lines.append(f"{path}: rename it to {ROUTING_FILE}, its name in this version of vmoe")
        print_messages(lines)
    return loaded
