"""Figures of a model's routing. Each function returns a matplotlib ``Figure`` to show or save.

    experts_by_class(statistics(parts), class_names).savefig("experts_by_class.png")

The arguments are results of ``vmoe.analysis``. An expert has the same color in all figures
(``vmoe/analysis/colors.py``), next to its number.

The functions raise a ``UsageError`` if a block does not exist, its router makes no choices, the
images are not the collected ones, or classes are needed and no image has a known class.
"""

from vmoe.analysis.plots.accuracies import capacity_curves, k_at_inference, random_routers
from vmoe.analysis.plots.experts import experts_by_class, weight_histograms
from vmoe.analysis.plots.images import experts_of_patches, kept_patches, top_patches

__all__ = [
    "capacity_curves",
    "experts_by_class",
    "experts_of_patches",
    "top_patches",
    "k_at_inference",
    "kept_patches",
    "random_routers",
    "weight_histograms",
]
