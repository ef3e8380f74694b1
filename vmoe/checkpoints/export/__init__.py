"""Trained models for other programs: a program of jax.export, ONNX, the V-MoE authors' files."""
