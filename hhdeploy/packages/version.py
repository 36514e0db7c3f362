"""The version of hhdeploy itself."""

from __future__ import annotations

import importlib.metadata


def own_version() -> str:
    """As it was installed; ``unknown`` in a checkout that is only on the path."""
    try:
        return importlib.metadata.version("hhdeploy")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
