"""Small random models of other libraries' ViT families, and their outputs."""
