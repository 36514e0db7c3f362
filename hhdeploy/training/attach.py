"""Attach an adapter to a model, take it off again, and save it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter, Head, SiteTensors, save_adapter
from hhdeploy.backbones.sites import SEQUENTIAL_KINDS, LinearSpec, select_sites, sites_of
from hhdeploy.backbones.structure import (
    base_sha256,
    classifier_path,
    find_linears,
    parameters_of,
)
from hhdeploy.errors import AdapterError
from hhdeploy.training.householder import (
    AdditiveDelta,
    HouseholderMatrix,
    SequentialTransform,
    new_site,
)

_STATE = "_hhdeploy_attached"


class _Attached:
    """What `detach` needs to give the backbone back, kept on the model."""

    def __init__(self, config: AdapterConfig, classifier: str, old_head: nn.Module | None) -> None:
        self.config, self.classifier, self.old_head = config, classifier, old_head


def attach(model: nn.Module, adapter: Adapter | AdapterConfig, *, seed: int = 0) -> nn.Module:
    """Turn a model, in place, into the training-time model of one adapter.

    The backbone is frozen; the adapter's tensors and its new classifier are the only parameters
    that require gradients.

    Args:
        model: any module with Linears: of timm, transformers, torchvision, or your own.
        adapter: an `Adapter` (its trained tensors are loaded) or an `AdapterConfig` (a new,
            untrained adapter for ``config.target_modules``).
        seed: of the initial values of a new adapter.

    Returns:
        ``model``.

    Raises:
        AdapterError: a target or a site that the model does not have, a matrix of another
            size, the sequential form elsewhere than after proj and fc2, or an adapter is
            attached already. The model is then as it was.
    """
    if hasattr(model, _STATE):
        raise AdapterError("an adapter is attached to this model already; call detach first.")
    config = adapter.config if isinstance(adapter, Adapter) else adapter
    generator = torch.Generator().manual_seed(seed)
    path = classifier_path(model)
    linears = find_linears(model, path)
    matrices = (
        _trained_matrices(adapter)
        if isinstance(adapter, Adapter)
        else _new_matrices(adapter, linears, generator)
    )
    _check_sites(matrices, linears, config)
    if not path and (config.num_classes is not None):
        raise AdapterError(
            f"{type(model).__name__} has no classifier: no Linear that stands alone at its end. An "
            "adapter without classes (num_classes None) needs none."
        )
    config = _bound(model, path, config)
    reference = next(model.parameters())
    model.requires_grad_(False)
    for linear in linears:
        own = {site.name: matrices.pop(site.name) for site in linear.sites if site.name in matrices}
        if own:
            for matrix in own.values():
                matrix.to(reference.device, reference.dtype)
            _parametrize(model, linear, own, config)
    old_head = None
    if isinstance(adapter, Adapter) and adapter.head is not None:
        old_head = _set_head(
            model, path, torch.from_numpy(adapter.head.weight), torch.from_numpy(adapter.head.bias)
        )
    elif isinstance(adapter, AdapterConfig) and config.num_classes is not None:
        dim = model.get_submodule(path).in_features
        weight = torch.randn(config.num_classes, int(dim), generator=generator) * 0.02  # type: ignore[arg-type]
        old_head = _set_head(model, path, weight, torch.zeros(config.num_classes))
    object.__setattr__(model, _STATE, _Attached(config, path, old_head))
    return model


def _bound(model: nn.Module, classifier: str, config: AdapterConfig) -> AdapterConfig:
    """The configuration with the digest of the weights that it is attached to.

    Weights of another type than float32 are not those that a bundle has: no digest then.
    """
    whole = {p.dtype for p in model.parameters()} == {torch.float32}
    real = not any(p.is_meta for p in model.parameters())
    if config.base_sha256 is not None or not whole or not real:
        return config
    return replace(config, base_sha256=base_sha256(model, classifier))


def detach(model: nn.Module) -> nn.Module:
    """Take the adapter off, in place: the backbone's weights and classifier are as before."""
    state = _state(model)
    for linear in find_linears(model, state.classifier):
        module, *names = parameters_of(model, linear.path)
        for name in names:
            if parametrize.is_parametrized(module, name):
                parametrize.remove_parametrizations(module, name, leave_parametrized=False)
    if state.old_head is not None:
        _replace_module(model, state.classifier, state.old_head)
    object.__delattr__(model, _STATE)
    return model


def extract(model: nn.Module) -> Adapter:
    """The attached adapter's tensors and head as they are now, float32 on the CPU."""
    state = _state(model)
    sites: dict[str, SiteTensors] = {}
    for linear in find_linears(model, state.classifier):
        module, weight, _ = parameters_of(model, linear.path)
        if parametrize.is_parametrized(module, weight):
            parametrization: Any = module.parametrizations[weight][0]  # type: ignore[index]
            for name, matrix in zip(parametrization.names, parametrization.matrices, strict=True):
                sites[name] = SiteTensors(**{k: _numpy(t) for k, t in matrix.tensors().items()})
    head = None
    if state.old_head is not None:
        classifier: Any = model.get_submodule(state.classifier)
        head = Head(state.classifier, _numpy(classifier.weight), _numpy(classifier.bias))
    return Adapter(state.config, sites, head)


def save(model: nn.Module, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write the attached adapter as an adapter directory, atomically."""
    save_adapter(extract(model), directory, overwrite=overwrite)


def _state(model: nn.Module) -> _Attached:
    state = getattr(model, _STATE, None)
    if state is None:
        raise AdapterError("no adapter is attached to this model; call attach first.")
    assert isinstance(state, _Attached)
    return state


def _check_sites(
    matrices: Mapping[str, HouseholderMatrix],
    linears: tuple[LinearSpec, ...],
    config: AdapterConfig,
) -> None:
    known = sites_of(linears)
    if unknown := sorted(set(matrices) - set(known)):
        raise AdapterError(
            f"the model has no site {', '.join(unknown[:5])}: the adapter belongs to "
            "another architecture."
        )
    for name, matrix in matrices.items():
        site = known[name]
        if config.form == "sequential" and site.kind not in SEQUENTIAL_KINDS:
            raise AdapterError(
                f"the sequential form acts after {', '.join(SEQUENTIAL_KINDS)} only, not at {name}."
            )
        expected = (site.out, site.out if config.form == "sequential" else site.in_)
        if matrix.shape != expected:
            raise AdapterError(
                f"{name}: expected tensors for a {expected[0]} x {expected[1]} matrix "
                f"({config.form}), found {matrix.shape[0]} x {matrix.shape[1]}."
            )


def _parametrize(
    model: nn.Module,
    linear: LinearSpec,
    matrices: dict[str, HouseholderMatrix],
    config: AdapterConfig,
) -> None:
    module, weight, bias = parameters_of(model, linear.path)
    if config.form == "additive":
        starts = {site.name: i * site.out for i, site in enumerate(linear.sites)}
        delta = AdditiveDelta({name: (starts[name], m) for name, m in matrices.items()})
        parametrize.register_parametrization(module, weight, delta)
        return
    ((name, matrix),) = matrices.items()
    transform = SequentialTransform(name, matrix)
    parametrize.register_parametrization(module, weight, transform)
    if getattr(module, bias) is not None:
        parametrize.register_parametrization(module, bias, transform)


def _trained_matrices(adapter: Adapter) -> dict[str, HouseholderMatrix]:
    matrices = {}
    for name, site in adapter.sites.items():
        tensors = {
            key: torch.from_numpy(np.ascontiguousarray(value))
            for key in ("u", "v", "d", "lora_A", "lora_B")
            if (value := getattr(site, key)) is not None
        }
        matrices[name] = HouseholderMatrix(tensors, adapter.config.reflection)
    return matrices


def _new_matrices(
    config: AdapterConfig, linears: tuple[LinearSpec, ...], generator: torch.Generator
) -> dict[str, HouseholderMatrix]:
    matrices = {}
    selected = select_sites(linears, config.target_modules)
    for target, sites in selected.items():
        if not sites:
            raise AdapterError(f"target_modules: {target!r} matches no Linear of the model.")
        for site in sites:
            in_ = site.out if config.form == "sequential" else site.in_
            matrices[site.name] = new_site(
                site.out, in_, config.r, config.form, config.reflection, generator
            )
    return matrices


def _set_head(model: nn.Module, path: str, weight: Tensor, bias: Tensor) -> nn.Module:
    """Put a new classifier in place; returns the old one."""
    old = model.get_submodule(path)
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head = head.to(next(model.parameters()).device, next(model.parameters()).dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    _replace_module(model, path, head)
    return old


def _replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _numpy(tensor: Tensor) -> NDArray[np.float32]:
    copied: NDArray[np.float32] = tensor.detach().float().cpu().numpy().copy()
    return copied
