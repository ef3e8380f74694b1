"""How does a model use its experts, and is anything wrong with that? ``vmoe routing``.

``measure`` answers it, and compares two models; ``report`` puts it into a table, sentences and
JSON, ``figures`` into pictures, ``page`` into HTML.
"""
