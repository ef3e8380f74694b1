"""How few slots do the experts of each block need? ``vmoe capacity``.

``settings`` lists the settings to try in each sparse block, ``costs`` has their costs, and
``scores`` measures the model with them. ``search`` finds the best settings within budgets.
"""
