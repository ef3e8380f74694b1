"""How robust are predictions and routing? ``vmoe attack``.

To changes of the pixels of an image (``images``); and, since images of a group compete for slots,
to the other images of its group, its mates (``mates``, whose forward passes and changes of pixels
are the programs in ``mates_program``).
"""
