"""A router of a user, in a file that is also a config: it has a state, a loss and a sum."""

import dataclasses
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

import vmoe
from vmoe.axes import Decision, RouterInputs
from vmoe.config import load, replace
from vmoe.routing.token_choice import assign


@dataclasses.dataclass(frozen=True)
class Own(vmoe.Router):
    """Switch, with logits that are divided by a temperature, the mean largest gate so far."""

    kind: Literal["own"] = "own"
    rate: float = 0.5

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        assert inputs.state is not None
        gates = jax.nn.softmax(inputs.logits / inputs.state["temperature"][:, None, None])
        routing = assign(gates, inputs.valid, k=1, c=c)
        largest = jnp.where(inputs.valid, gates.max(-1), 0)
        loss = (largest**2).sum(-1)  # of each group
        return Decision(gates, routing, losses={"own": loss}, sums={"largest": largest.sum(-1)})

    def initial_state(self, e: int) -> dict[str, jax.Array]:
        return {"temperature": jnp.ones(())}

    def next_state(
        self, state: dict[str, jax.Array], sums: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        mean = sums["largest"] / sums["tokens"]
        return {"temperature": (1 - self.rate) * state["temperature"] + self.rate * mean}


config = replace(
    load(Path(__file__).parent / "tiny.py"),
    model=dict(moe=dict(router=Own())),
    data=dict(num_workers=1),
)
