"""Multi-task models: published results, measured again; ``command`` says which."""
