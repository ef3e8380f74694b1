"""How few slots do the experts of each block need? ``vmoe capacity``.

``settings`` are tried in each sparse block; ``costs`` says what they cost, ``scores`` how well the
model does with them; ``search`` finds the best ones within budgets.
"""
