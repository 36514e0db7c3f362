"""Processes beside the server's own, and memory that all of them give back."""
