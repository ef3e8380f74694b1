"""Opens a model with the routing that ``vmoe capacity`` chose for it, and says so."""

from pathlib import Path
from typing import TYPE_CHECKING

from vmoe.cli.printing import print_messages
from vmoe.config import RoutingOverrides

if TYPE_CHECKING:
    from vmoe.factory import Loaded

UNITS = {"flops": "FLOPs", "time": "time"}
AS_TRAINED = "none"  # the value of --inference for no file


def load_for_inference(
    checkpoint: Path, inference: str, *, routing: RoutingOverrides | None = None, use_ema: bool
) -> "Loaded":
    """The model of ``vmoe.load``.

    Args:
        inference: a file; "none"; or empty for that of the run folder, unless routing is given.
    """
    from vmoe.data.pipeline import ORDER
    from vmoe.factory import load

    unchanged = routing in (None, RoutingOverrides())
    file = {"": unchanged, AS_TRAINED: False}.get(inference, inference)
    loaded = load(checkpoint, routing=routing, use_ema=use_ema, inference=file)
    if loaded.inference:
        path, chosen = loaded.inference
        other = chosen.step != loaded.step and None not in (chosen.step, loaded.step)
        step = f", at step {chosen.step} of training" if other else ""
        cost = f"{chosen.cost:.3g}x the {UNITS[chosen.by]}"
        line = f"routing of {path}: {cost}, chosen on {chosen.data}"
        lines = [f"{line}{step} (--inference none for that of training)"]
        if chosen.order != ORDER:
            lines.append(
                f"{path}: its accuracies are of images in another order ({chosen.order}; now "
                f"{ORDER}): run vmoe capacity again to measure them"
            )
        print_messages(lines)
    return loaded
