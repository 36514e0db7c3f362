"""hhdeploy: deploy Householder (HTA) and LoRA adapters of Vision Transformers.

    from hhdeploy import load_adapter, save_adapter, export, verify

Names are imported on first use: ``import hhdeploy`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hhdeploy.adapters.config import AdapterConfig
    from hhdeploy.adapters.format import Adapter, load_adapter, save_adapter
    from hhdeploy.errors import HhdeployError
    from hhdeploy.exporting.bundles import export
    from hhdeploy.plan import Reserve
    from hhdeploy.verifying.bundles import verify

_HOMES = {
    "Adapter": "hhdeploy.adapters.format",
    "AdapterConfig": "hhdeploy.adapters.config",
    "HhdeployError": "hhdeploy.errors",
    "Reserve": "hhdeploy.plan",
    "export": "hhdeploy.exporting.bundles",
    "load_adapter": "hhdeploy.adapters.format",
    "save_adapter": "hhdeploy.adapters.format",
    "verify": "hhdeploy.verifying.bundles",
}

__all__ = [
    "Adapter",
    "AdapterConfig",
    "HhdeployError",
    "Reserve",
    "export",
    "load_adapter",
    "save_adapter",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'hhdeploy' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
