"""Would a sparse last block help a dense model on these images?

``measures`` has what images and a model show before any training, ``advice`` the nearest of the
three data sets of ``python -m scripts.experiments solar``, and what was found there. Their figures
are in ``reference.json``, which ``python -m scripts.maintain.advice`` writes.
"""
