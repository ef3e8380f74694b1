"""Each task has its own expert, for tokens of several tasks or data sets: ViTPose++'s routing.

Whoever calls the layer gives the task of each token, whose number is that of its expert. In
ViTPose++ a task is a data set, and an expert makes the last channels of a block's MLP from hidden
units that all tasks share; docs/layer.md has that MLP.

Source: "ViTPose++: Vision Transformer for Generic Body Pose Estimation" (arXiv 2212.04246).
"""

import dataclasses

import jax.numpy as jnp

from vmoe.axes import Decision, RouterInputs
from vmoe.errors import UsageError
from vmoe.routing.router import Router
from vmoe.routing.token_choice import evenly_weighted


@dataclasses.dataclass(frozen=True)
class ByTask(Router):
    """The task of a token is its expert (ViTPose++, arXiv 2212.04246).

    A layer with it takes ``per_token={"task": tasks}``, i32 like the mask. A token whose task is
    not in [0, e) has no expert. No config names this router, since a ViT knows no tasks.
    """

    dropless: bool = True
    """Compute every choice, without a capacity."""

    logits_per = None
    normalized = True
    takes = ("task",)

    def __post_init__(self) -> None:
        super().__post_init__()
        unused = self.dropless and self.capacity_factor != ByTask.capacity_factor
        self.require(not unused, "it needs dropless=False", "capacity_factor")

    def __call__(self, inputs: RouterInputs, c: int) -> Decision:
        assert inputs.per_token is not None
        e, tasks = inputs.logits.shape[-1], inputs.per_token["task"]
        if tasks.shape != inputs.valid.shape or not jnp.issubdtype(tasks.dtype, jnp.integer):
            raise UsageError(
                f"task has dtype {tasks.dtype} and, by group, shape {tasks.shape}: give one "
                "integer for each token"
            )
        known = (tasks >= 0) & (tasks < e)
        experts = jnp.where(known, tasks, e)[..., None]
        return evenly_weighted(experts, inputs.valid, e=e, c=c)
