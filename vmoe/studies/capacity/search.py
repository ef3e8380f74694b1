"""Searches k, capacity and priority of each sparse block for the best accuracy within a budget.

One greedy descent serves all budgets. It starts with the most slots in every block and repeatedly
lowers one block by one level: the block, with its best k and priority, whose loss rises least per
cost saved. The best setting within a budget is then improved by single changes: another k or
priority in one block, or a level of slots moved from one block to another.

The loss is the divergence from the predictions of the model as trained (``Score``).
"""

import heapq
import math
from collections.abc import Iterator, Sequence
from typing import Any

from vmoe.config.routing_file import LayerSetting
from vmoe.studies.capacity.costs import Costs
from vmoe.studies.capacity.scores import Scores
from vmoe.studies.capacity.settings import Levels, Setting

SLIGHT = 1e-9  # tolerance of costs, for rounding


class Search:
    """Finds the settings of a model with the least loss within budgets."""

    def __init__(self, scores: Scores, costs: Costs, levels: Sequence[Levels]):
        """Searches the levels that ``levels_of`` gives for each sparse block."""
        self._scores, self._costs, self._levels = scores, costs, levels
        self._blocks = range(len(levels))
        self._level = [
            {own: i for i, level in enumerate(of_block) for own in level.values()}
            for of_block in levels
        ]
        self._path: list[Setting] = []

    def uniform(self, budget: float) -> Setting | None:
        """The best setting shared by all blocks; None if none is within the budget."""
        first, *others = self._level
        in_all = [own for own in first if all(own in each for each in others)]
        same = [(own,) * len(self._blocks) for own in in_all]
        within = [setting for setting in same if self._fits(setting, budget)]
        return min(within, key=self._loss, default=None)

    def best(self, budget: float) -> Setting:
        """The best setting found within a budget.

        Raises:
            UsageError: every setting costs more.
        """
        self._costs.check(budget)
        if not self._path:
            self._path = list(self._descend())
        within = [setting for setting in self._path if self._fits(setting, budget)]
        within.append(self.uniform(budget) or self._cheapest())
        return self._improved(min(within, key=self._loss), budget)

    def row(self, budget: float) -> dict[str, Any]:
        """The best setting within a budget and the best uniform one, with cost and accuracy."""
        row: dict[str, Any] = {"budget": budget}
        for suffix, setting in (("", self.best(budget)), ("_uniform", self.uniform(budget))):
            cost = accuracy = None
            if setting is not None:
                cost, accuracy = self._costs.of(setting), self._scores.of(setting).accuracy
            row |= {f"setting{suffix}": setting, f"cost{suffix}": cost}
            row[f"accuracy{suffix}"] = accuracy
        return row

    def _loss(self, setting: Setting) -> float:
        return self._scores.of(setting).divergence

    def _fits(self, setting: Setting, budget: float) -> bool:
        return self._costs.of(setting) <= budget + SLIGHT

    def _cheapest(self) -> Setting:
        return tuple(
            min(tried, key=lambda own: changes[own.k, own.capacity_factor])
            for tried, changes in zip(self._level, self._costs.changes, strict=True)
        )

    def _descend(self) -> Iterator[Setting]:
        """From the most to the fewest slots, one level of one block at a time."""
        options = self._levels[0][-1]
        top = [tuple(of_block[-1][each] for of_block in self._levels) for each in options]
        setting, step = min(top, key=self._loss), 0
        yield setting
        queue = [(-math.inf, block, -1, setting) for block in self._blocks]
        while queue:
            _, block, measured, proposal = heapq.heappop(queue)
            if measured == step:
                setting, step = proposal, step + 1
                yield setting
            if lower := self._lowered(setting, block):
                heapq.heappush(queue, (self._price(setting, lower), block, step, lower))

    def _lowered(self, setting: Setting, block: int) -> Setting | None:
        """One level fewer in a block, with the best k and priority; None at the lowest level."""
        level = self._level[block][setting[block]]
        if not level:
            return None
        lower = [self._with(setting, block, own) for own in self._levels[block][level - 1].values()]
        return min(lower, key=self._loss)

    def _price(self, setting: Setting, lower: Setting) -> float:
        """How much the loss rises for each unit of cost that is saved."""
        saved = self._costs.of(setting) - self._costs.of(lower)
        return (self._loss(lower) - self._loss(setting)) / max(saved, SLIGHT)

    def _improved(self, setting: Setting, budget: float) -> Setting:
        """Applies single changes within a budget as long as they lower the loss."""
        while True:
            for changed in self._neighbors(setting):
                if self._fits(changed, budget) and self._loss(changed) < self._loss(setting):
                    setting = changed
                    break
            else:
                return setting

    def _neighbors(self, setting: Setting) -> Iterator[Setting]:
        for block in self._blocks:
            for own in self._levels[block][self._level[block][setting[block]]].values():
                if own != setting[block]:
                    yield self._with(setting, block, own)
        for block in self._blocks:
            if higher := self._moved(setting, block, +1):
                yield higher
                for other in self._blocks:
                    if other != block and (moved := self._moved(higher, other, -1)):
                        yield moved

    def _moved(self, setting: Setting, block: int, by: int) -> Setting | None:
        """More or fewer levels of slots in a block; None if there is no such level."""
        own = setting[block]
        level = self._level[block][own] + by
        if not 0 <= level < len(self._levels[block]):
            return None
        return self._with(setting, block, self._levels[block][level][own.k, own.priority])

    def _with(self, setting: Setting, block: int, own: LayerSetting) -> Setting:
        return (*setting[:block], own, *setting[block + 1 :])
