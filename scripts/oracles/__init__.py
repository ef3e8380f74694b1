"""Small random models of other people's ViT families, and what they compute."""
