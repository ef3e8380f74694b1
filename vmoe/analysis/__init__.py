"""Analysis of routing: records of a model's sparse blocks, their statistics, and interventions."""

from vmoe.analysis.capture import Captured, capture, capture_features, feature_names
from vmoe.analysis.collect import (
    BlockRouting,
    Collected,
    collect,
    concatenate,
    foreground,
)
from vmoe.analysis.compare import agreement, saturation
from vmoe.analysis.statistics import BlockStatistics, statistics
from vmoe.passes import in_batches
from vmoe.routing.load import block_measures, expert_totals

__all__ = [
    "BlockRouting",
    "BlockStatistics",
    "Captured",
    "Collected",
    "agreement",
    "block_measures",
    "capture",
    "capture_features",
    "collect",
    "concatenate",
    "expert_totals",
    "feature_names",
    "foreground",
    "in_batches",
    "saturation",
    "statistics",
]
