"""Bundles from adapters and a backbone, and further graphs of bundles that exist."""
