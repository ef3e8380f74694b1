"""All that training changes."""

from typing import Any, NamedTuple

from jaxtyping import Array, Int

Params = dict[str, Any]


class State(NamedTuple):
    """All that training changes.

    Attributes:
        step: how many steps have been taken.
        batch: the number of the next batch: the step, and what was jumped over after a NaN.
        rewinds: how often the run went back after a NaN.
        params: the model's parameters, as nested dicts.
        moments: the optimiser's state.
        ema: a moving average of the parameters; None where the config asks for none.
    """

    step: Int[Array, ""]
    batch: Int[Array, ""]
    rewinds: Int[Array, ""]
    params: Params
    moments: Any
    ema: Params | None
