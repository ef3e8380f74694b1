"""Does a sparse last block help on photographs of solar cells? See ``command``."""
