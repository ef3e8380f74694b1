"""Claims of the literature on sparse models, checked by small ones; see ``command``."""
