"""How robust are predictions and routing? ``vmoe attack``.

``images`` changes the pixels of an image. ``mates`` changes the other images of its group, its
mates, which compete with it for slots; ``mates_program`` has the compiled programs for that.
"""
