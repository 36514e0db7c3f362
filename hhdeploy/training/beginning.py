"""What an attached adapter begins with: the tensors of its files or new ones, on a model that it
belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hhdeploy.adapters.bases import check_answer
from hhdeploy.adapters.checks import check, check_targets
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import LinearSpec, select_sites
from hhdeploy.backbones.structure import states_transform
from hhdeploy.errors import BackboneError
from hhdeploy.training.heads import check_head, check_place
from hhdeploy.training.householder import HouseholderMatrix, new_site
from hhdeploy.training.wrapping import (
    bare_answer,
    check_computed,
    check_weights,
    size_of_images,
    without_values,
)


@dataclass(frozen=True, eq=False)
class Beginning:
    """What is to be put on a model.

    Attributes:
        config: bound to the model.
        matrices: site -> its matrix.
        parts: site -> its multipliers and its shift of the bias.
        head: weight and bias of the classifier; None: the model's own stays.
        values: parameter path -> what replaces it.
        source: where these come from, for messages.
        strength: of all but the classifier.
    """

    config: AdapterConfig
    matrices: Mapping[str, HouseholderMatrix]
    parts: Mapping[str, Mapping[str, Tensor]]
    head: tuple[Tensor, Tensor] | None
    values: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)
    source: str = ""
    strength: float = 1.0


def begin_trained(model: nn.Module, facts: BackboneFacts, adapter: Adapter) -> Beginning:
    """What an adapter's files hold, on the model that it was trained on.

    Raises:
        AdapterError: it does not belong to the model, see `hhdeploy.training.attach`.
        BackboneError: the model has no values, or its classifier cannot be replaced.
    """
    if (fault := without_values(model)) is not None:
        raise BackboneError(fault)
    name = Path(adapter.source).name
    check(name, adapter, facts)
    check_head(model, facts, adapter)
    if (known := adapter.config.base_answer) is not None:
        found = bare_answer(model, facts.classifier, known.input_size)
        check_answer(name, adapter, facts, found)
    matrices, parts = _trained_matrices(adapter), _trained_parts(adapter)
    check_weights(model, _changed(facts, {*matrices, *parts}))
    head = None
    if adapter.head is not None:
        head = torch.from_numpy(adapter.head.weight), torch.from_numpy(adapter.head.bias)
    config = _bound(adapter.config, facts)
    return Beginning(
        config, matrices, parts, head, adapter.values, adapter.source, adapter.strength
    )


def begin_new(
    model: nn.Module, facts: BackboneFacts, config: AdapterConfig, seed: int
) -> Beginning:
    """Untrained tensors of a new adapter, which is bound to the model.

    Raises:
        AdapterError: the model has no such sites, or what is computed there is no Linear.
        BackboneError: the model's classifier cannot be replaced.
    """
    check_targets(config, facts, "the new adapter")
    check_place(model, facts, config)
    generator = torch.Generator().manual_seed(seed)
    matrices = _new_matrices(config, facts.linears, generator)
    linears = _changed(facts, matrices)
    check_weights(model, linears)
    size = size_of_images(model, facts, config)
    check_computed(model, linears, size)
    head = None
    if config.num_classes is not None:
        weight = 0.02 * torch.randn(config.num_classes, facts.dim, generator=generator)
        head = weight, torch.zeros(config.num_classes)
    config = _bound(config, facts)
    if config.preprocess is None and states_transform(model):
        config = replace(config, preprocess=facts.preprocess)
    config = replace(config, base_answer=bare_answer(model, facts.classifier, size))
    return Beginning(config, matrices, {}, head)


def _bound(config: AdapterConfig, facts: BackboneFacts) -> AdapterConfig:
    """The configuration with the digest of the model's weights, or of their signs where rounding
    keeps no more."""
    digest = facts.sha256 or None
    signs = None if digest else facts.signs or None
    return replace(config, base_sha256=digest, base_signs=signs, base_buffers=facts.buffers or None)


def _changed(facts: BackboneFacts, sites: Collection[str]) -> list[LinearSpec]:
    """The Linears that some sites are of."""
    return [x for x in facts.linears if any(site.name in sites for site in x.sites)]


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


def _trained_parts(adapter: Adapter) -> dict[str, dict[str, Tensor]]:
    """Site -> its multipliers and its shift of the bias, of sites that have some."""
    return {
        name: {part: torch.from_numpy(np.ascontiguousarray(t)) for part, t in site.parts.items()}
        for name, site in adapter.sites.items()
        if site.parts
    }


def _trained_matrices(adapter: Adapter) -> dict[str, HouseholderMatrix]:
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


def _new_matrices(
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
