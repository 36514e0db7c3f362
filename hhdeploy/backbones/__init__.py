"""Backbones: what is traced, what an adapter may change in it, and what others know of it."""
