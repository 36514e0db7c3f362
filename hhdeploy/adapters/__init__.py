"""Adapters: their files, what they must be to belong to a backbone, and where they come from."""
