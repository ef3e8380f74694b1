"""Classic mixtures: published results, measured again; ``command`` says which."""
