"""Figures of a model's routing, as matplotlib figures that nothing has drawn or saved yet.

    experts_by_class(statistics(parts), class_names).savefig("experts_by_class.png")

They take what the functions of ``vmoe.analysis`` return. An expert has the same color in all of
them (``vmoe/analysis/colors.py``), and is named by its number as well.

A ``UsageError`` says if a block does not exist or its router makes no choices to draw, if no image
has a known class, which accuracies need, and if the images are not those that were collected.
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
