"""Analysis of routing: records of a model's sparse blocks, their statistics, and interventions."""

from vmoe.analysis.capture import capture
from vmoe.analysis.collect import BlockRouting, Collected, collect, concatenate, labelled
from vmoe.analysis.statistics import BlockStatistics, statistics

__all__ = [
    "BlockRouting",
    "BlockStatistics",
    "Collected",
    "capture",
    "collect",
    "concatenate",
    "labelled",
    "statistics",
]
