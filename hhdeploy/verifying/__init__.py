"""Bundles compared with their hashes and with the training-time model."""
