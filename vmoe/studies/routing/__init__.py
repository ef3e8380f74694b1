"""How does a model use its experts, and does its routing have problems? ``vmoe routing``.

``measure`` measures the routing of a model, and compares two models. The results are printed by
``report``, drawn by ``figures``, and written as an HTML page by ``page``.
"""
