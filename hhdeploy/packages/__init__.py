"""The optional packages: which extra brings them, their bounds, and TensorRT under one name."""
