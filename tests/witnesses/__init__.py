"""Bundles as released formats wrote them, kept for ever: every later version must open them."""
