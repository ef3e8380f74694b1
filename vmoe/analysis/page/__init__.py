"""An HTML page to explore the routing of a model on images.

The page is one file and loads nothing from a network. ``rule.js`` assigns slots to choices in the
browser, by the rule of ``vmoe/routing/token_choice.py``. Everything else on the page is computed
here, by the model.
"""

from vmoe.analysis.page.observe import ModelOnImages, count_passes, observe
from vmoe.analysis.page.render import render

__all__ = ["ModelOnImages", "count_passes", "observe", "render"]
