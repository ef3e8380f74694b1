"""One HTML page on which people explore the routing of a model on images.

The file contains all that it needs and loads nothing from a network. ``rule.js`` decides in the
browser which choices get a slot, as ``vmoe/routing/token_choice.py`` does; everything else that the
page shows is computed here, by the model.
"""

from vmoe.analysis.page.observe import ModelOnImages, count_passes, observe
from vmoe.analysis.page.render import render

__all__ = ["ModelOnImages", "count_passes", "observe", "render"]
