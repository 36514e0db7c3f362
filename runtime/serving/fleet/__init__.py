"""Adapters by name: rows, folders, and what is known of each."""
