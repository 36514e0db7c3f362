"""Attach an adapter to a timm model, take it off again, and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hhdeploy.adapters.checks import check, check_targets
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter, Head, SiteTensors, save_adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import LinearSpec, select_sites
from hhdeploy.backbones.timm import (
    base_sha256,
    classifier_path,
    find_linears,
    preprocess_of,
    resolved_name,
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
    """Turn a timm model, in place, into the training-time model of one adapter.

    The backbone is frozen; the adapter's tensors and its new classifier are the only parameters
    that require gradients.

    Args:
        model: a timm model whose Linears are named as timm's ViTs name them.
        adapter: an `Adapter` (its trained tensors are loaded) or an `AdapterConfig` (a new,
            untrained adapter for ``config.target_modules``).
        seed: of the initial values of a new adapter.

    Returns:
        ``model``.

    Raises:
        AdapterError: the adapter does not belong to the model (see `check`), or one is attached
            already. The model is then as it was.
    """
    if hasattr(model, _STATE):
        raise AdapterError("an adapter is attached to this model already; call detach first.")
    config = adapter.config if isinstance(adapter, Adapter) else adapter
    generator = torch.Generator().manual_seed(seed)
    facts = _facts_of(model, config)
    linears = facts.linears
    if isinstance(adapter, Adapter):
        check(Path(adapter.source).name, adapter, facts)
        matrices = _trained_matrices(adapter)
    else:
        check_targets(adapter, facts, "the new adapter")
        matrices = _new_matrices(adapter, linears, generator)
    reference = next(model.parameters())
    model.requires_grad_(False)
    for linear in linears:
        own = {site.name: matrices.pop(site.name) for site in linear.sites if site.name in matrices}
        if own:
            for matrix in own.values():
                matrix.to(reference.device, reference.dtype)
            _parametrize(model.get_submodule(linear.path), linear, own, config)
    path, old_head = facts.classifier, None
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


def detach(model: nn.Module) -> nn.Module:
    """Take the adapter off, in place: the backbone's weights and classifier are as before."""
    state = _state(model)
    for linear in find_linears(model):
        module = model.get_submodule(linear.path)
        for name in ("weight", "bias"):
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
    for linear in find_linears(model):
        module = model.get_submodule(linear.path)
        if parametrize.is_parametrized(module, "weight"):
            parametrization: Any = module.parametrizations["weight"][0]  # type: ignore[index]
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


def _facts_of(model: nn.Module, config: AdapterConfig) -> BackboneFacts:
    """What a model in hand says of itself; what it does not say is taken from the adapter.

    Its digest is that of float32 weights, and asked only where the adapter has one to compare. It
    does not say which image size it was made for.
    """
    path = classifier_path(model)
    classifier: Any = model.get_submodule(path)
    digest = config.base_sha256
    if digest is not None and next(model.parameters()).dtype == torch.float32:
        digest = base_sha256(model, path)
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    return BackboneFacts(
        model=resolved_name(model, name) if name else config.base_model,
        args=config.base_model_args,
        sha256=digest or "",
        linears=find_linears(model),
        classifier=path,
        dim=int(classifier.in_features),
        classes=int(classifier.out_features),
        preprocess=config.preprocess or preprocess_of(model, config.base_model_args),
    )


def _parametrize(
    module: nn.Module,
    linear: LinearSpec,
    matrices: dict[str, HouseholderMatrix],
    config: AdapterConfig,
) -> None:
    if config.form == "additive":
        starts = {site.name: i * site.out for i, site in enumerate(linear.sites)}
        delta = AdditiveDelta({name: (starts[name], m) for name, m in matrices.items()})
        parametrize.register_parametrization(module, "weight", delta)
        return
    ((name, matrix),) = matrices.items()
    transform = SequentialTransform(name, matrix)
    parametrize.register_parametrization(module, "weight", transform)
    if module.bias is not None:
        parametrize.register_parametrization(module, "bias", transform)


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
    for sites in select_sites(linears, config.target_modules).values():
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
