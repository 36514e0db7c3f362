"""hhdeploy: deploy Householder (HTA) and LoRA adapters of Vision Transformers.

    from hhdeploy import export, open_session

Names are imported on first use: ``import hhdeploy`` imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hhdeploy import errors
    from hhdeploy.adapters.config import AdapterConfig
    from hhdeploy.adapters.format import Adapter, load_adapter, save_adapter
    from hhdeploy.adapters.importers import import_adapter
    from hhdeploy.adapters.importers.checkpoint import extract_adapter
    from hhdeploy.adapters.mixing import merge_adapters
    from hhdeploy.building import build
    from hhdeploy.bundle import Bundle, add_adapter, edit, remove_adapter
    from hhdeploy.bundle.bom import bill_of_materials
    from hhdeploy.bundle.hub import pull, push
    from hhdeploy.bundle.signing import check_signature, sign
    from hhdeploy.choices import Device, Precision
    from hhdeploy.errors import HhdeployError
    from hhdeploy.exporting.bundles import export
    from hhdeploy.exporting.web import write_web_page as write_web
    from hhdeploy.plan import Reserve
    from hhdeploy.quantising import calibrate_bundle as calibrate
    from hhdeploy.repositories.ovms import write_ovms_repository as write_ovms
    from hhdeploy.repositories.triton import write_triton_repository as write_triton
    from hhdeploy.runtime import open_session
    from hhdeploy.training import attach
    from hhdeploy.training.recipe import train
    from hhdeploy.verifying.bundles import verify, verify_against_torch

# Public name -> module and name there; "" is the module itself.
_HOMES = {
    "Adapter": ("hhdeploy.adapters.format", "Adapter"),
    "AdapterConfig": ("hhdeploy.adapters.config", "AdapterConfig"),
    "Bundle": ("hhdeploy.bundle", "Bundle"),
    "Device": ("hhdeploy.choices", "Device"),
    "HhdeployError": ("hhdeploy.errors", "HhdeployError"),
    "Precision": ("hhdeploy.choices", "Precision"),
    "Reserve": ("hhdeploy.plan", "Reserve"),
    "add_adapter": ("hhdeploy.bundle", "add_adapter"),
    "attach": ("hhdeploy.training", "attach"),
    "bill_of_materials": ("hhdeploy.bundle.bom", "bill_of_materials"),
    "build": ("hhdeploy.building", "build"),
    "calibrate": ("hhdeploy.quantising", "calibrate_bundle"),
    "check_signature": ("hhdeploy.bundle.signing", "check_signature"),
    "edit": ("hhdeploy.bundle", "edit"),
    "errors": ("hhdeploy.errors", ""),
    "export": ("hhdeploy.exporting.bundles", "export"),
    "extract_adapter": ("hhdeploy.adapters.importers.checkpoint", "extract_adapter"),
    "import_adapter": ("hhdeploy.adapters.importers", "import_adapter"),
    "load_adapter": ("hhdeploy.adapters.format", "load_adapter"),
    "merge_adapters": ("hhdeploy.adapters.mixing", "merge_adapters"),
    "open_session": ("hhdeploy.runtime", "open_session"),
    "pull": ("hhdeploy.bundle.hub", "pull"),
    "push": ("hhdeploy.bundle.hub", "push"),
    "remove_adapter": ("hhdeploy.bundle", "remove_adapter"),
    "save_adapter": ("hhdeploy.adapters.format", "save_adapter"),
    "sign": ("hhdeploy.bundle.signing", "sign"),
    "train": ("hhdeploy.training.recipe", "train"),
    "verify": ("hhdeploy.verifying.bundles", "verify"),
    "verify_against_torch": ("hhdeploy.verifying.bundles", "verify_against_torch"),
    "write_ovms": ("hhdeploy.repositories.ovms", "write_ovms_repository"),
    "write_triton": ("hhdeploy.repositories.triton", "write_triton_repository"),
    "write_web": ("hhdeploy.exporting.web", "write_web_page"),
}

__all__ = [
    "Adapter",
    "AdapterConfig",
    "Bundle",
    "Device",
    "HhdeployError",
    "Precision",
    "Reserve",
    "add_adapter",
    "attach",
    "bill_of_materials",
    "build",
    "calibrate",
    "check_signature",
    "edit",
    "errors",
    "export",
    "extract_adapter",
    "import_adapter",
    "load_adapter",
    "merge_adapters",
    "open_session",
    "pull",
    "push",
    "remove_adapter",
    "save_adapter",
    "sign",
    "train",
    "verify",
    "verify_against_torch",
    "write_ovms",
    "write_triton",
    "write_web",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hhdeploy' has no attribute {name!r}")
    module, attribute = _HOMES[name]
    found = importlib.import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return sorted(__all__)
