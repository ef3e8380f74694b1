"""What routers share with which a token may have any number of experts."""

import dataclasses
from typing import Annotated

from vmoe.fields import at_least
from vmoe.routing.router import Router


@dataclasses.dataclass(frozen=True)
class TargetK(Router):
    """A router with which a token may have any number of experts, ``target_k`` in the mean."""

    target_k: Annotated[int, at_least(1)] = 2
    """Mean number of experts per token that training aims at."""

    @property
    def k(self) -> int:
        return self.target_k
