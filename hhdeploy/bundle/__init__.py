"""Bundles: the manifest, reading, the one way to change them, and which adapters they have.

Needs NumPy and safetensors alone.
"""

from hhdeploy.bundle.membership import add_adapter, remove_adapter
from hhdeploy.bundle.reading import Bundle
from hhdeploy.bundle.store import edit

__all__ = ["Bundle", "add_adapter", "edit", "remove_adapter"]
