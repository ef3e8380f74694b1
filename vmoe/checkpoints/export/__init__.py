"""Trained models for other programs: programs of jax.export, ONNX, published V-MoE checkpoints."""
