"""A model of several tasks: inputs, body, and a tower for each task."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Float

from vmoe.errors import UsageError
from vmoe.host import forks
from vmoe.multitask.bodies import Body


class MultiTask(nnx.Module):
    """Several tasks on one input.

    >>> from vmoe.multitask import MultiGate
    >>> rngs = nnx.Rngs(0)
    >>> experts = [nnx.Linear(6, 8, rngs=rngs) for _ in range(3)]
    >>> gates = [nnx.Linear(6, 3, rngs=rngs) for _ in range(2)]
    >>> towers = {"income": nnx.Linear(8, 2, rngs=rngs), "age": nnx.Linear(8, 1, rngs=rngs)}
    >>> model = MultiTask(MultiGate(experts, gates), towers)
    >>> {name: outputs.shape for name, outputs in model(jax.numpy.ones((5, 6))).items()}
    {'income': (5, 2), 'age': (5, 1)}
    """

    def __init__(
        self, body: Body, towers: Mapping[str, nnx.Module], inputs: nnx.Module | None = None
    ):
        """
        Args:
            towers: by name of the task, in the order of the body's tasks: from features f[b f] to
                outputs f[b q].
            inputs: maps the model's inputs to rows f[b d]; None if the inputs are rows.
        """
        self.body = body
        self.names = tuple(towers)
        self.towers = nnx.List(towers.values())
        self.inputs = inputs

    def __call__(self, inputs: Any) -> dict[str, Float[Array, "b q"]]:
        """The outputs of each task by name."""
        return self.forward(inputs)[0]

    @jax.named_scope("multitask")
    def forward(
        self, inputs: Any
    ) -> tuple[dict[str, Float[Array, "b q"]], Float[Array, "t x e"] | None, Float[Array, ""]]:
        """The outputs by name, and the weights and the loss of the body; see ``BodyOutput``.

        Raises:
            UsageError: the body has another number of tasks than there are towers.
        """
        forks.check()
        rows = inputs if self.inputs is None else self.inputs(inputs)
        made = self.body(rows)
        if len(made.features) != len(self.names):
            raise UsageError(
                f"the body has {len(made.features)} tasks, and there are {len(self.names)} towers"
            )
        outputs = {
            name: tower(features)
            for name, tower, features in zip(self.names, self.towers, made.features, strict=True)
        }
        return outputs, made.weights, made.loss
