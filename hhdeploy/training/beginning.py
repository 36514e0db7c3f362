"""The tensors that an attached adapter begins with: those of its files, or new ones."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.sites import LinearSpec, select_sites
from hhdeploy.training.householder import HouseholderMatrix, new_site


def tensors_digest(adapter: Adapter) -> str:
    """sha256 of all that is trained: sites, replaced parameters and classifier."""
    named = {
        (site, part): value
        for site, tensors in adapter.sites.items()
        for part, value in vars(tensors).items()
        if value is not None
    }
    named |= {(path, "value"): value for path, value in adapter.values.items()}
    if adapter.head is not None:
        named |= {("head", "weight"): adapter.head.weight, ("head", "bias"): adapter.head.bias}
    digest = hashlib.sha256()
    for name, value in sorted(named.items(), key=lambda item: item[0]):
        digest.update(f"{name}\0{value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def trained_parts(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Site -> its multipliers and its shift of the bias, of sites that have some."""
    return {
        name: {part: torch.from_numpy(np.ascontiguousarray(t)) for part, t in site.parts.items()}
        for name, site in adapter.sites.items()
        if site.parts
    }


def trained_matrices(adapter: Adapter) -> dict[str, HouseholderMatrix]:
    """Site -> its matrix, of sites that have one."""
    matrices = {}
    for name, site in adapter.sites.items():
        tensors = {
            key: torch.from_numpy(np.ascontiguousarray(value))
            for key in ("u", "v", "d", "lora_A", "lora_B")
            if (value := getattr(site, key)) is not None
        }
        if not tensors:
            continue
        matrices[name] = HouseholderMatrix(tensors, adapter.config.reflection)
    return matrices


def new_matrices(
    config: AdapterConfig, linears: tuple[LinearSpec, ...], generator: torch.Generator
) -> dict[str, HouseholderMatrix]:
    """Site -> an untrained matrix, of the sites that the configuration asks for."""
    matrices = {}
    for sites in select_sites(linears, config.target_modules).values():
        for site in sites:
            in_ = site.out if config.form == "sequential" else site.in_
            matrices[site.name] = new_site(
                site.out, in_, config.r, config.form, config.reflection, generator
            )
    return matrices
