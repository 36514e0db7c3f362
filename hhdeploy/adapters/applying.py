"""What an adapter makes of the backbone's parameters, dense, in float64: to compare and to judge.

Folding and side branches never do it this way; see `hhdeploy.algebra`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter
from hhdeploy.algebra import Array, SiteChange
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.backbones.structure import parameters_of

if TYPE_CHECKING:
    from torch import nn

    from hhdeploy.backbones.spec import Backbone


def parameters_with(backbone: Backbone, adapter: Adapter) -> dict[str, Array]:
    """Parameter path -> its value with the adapter, of those that it changes; also a bias that it
    gives a Linear without one."""
    found = values_with(backbone, adapter)
    for linear in backbone.facts.linears:
        if any(site.name in adapter.sites for site in linear.sites):
            found |= linear_with(backbone, adapter, linear, found)
    if adapter.head is not None:
        path = adapter.head.path
        found[f"{path}.weight"] = adapter.head.weight.astype(np.float64)
        found[f"{path}.bias"] = adapter.head.bias.astype(np.float64)
    return found


def linear_with(
    backbone: Backbone,
    adapter: Adapter,
    linear: LinearSpec,
    values: Mapping[str, NDArray[np.floating]],
) -> dict[str, Array]:
    """As `parameters_with`, of the parameters of one Linear.

    Args:
        backbone: the model, bare.
        adapter: that changes a site of it.
        linear: the Linear.
        values: its weight and bias where the adapter replaces them as a whole; see `values_with`.
    """
    names = path_of_parameters(backbone, linear)
    own = dict(backbone.model.named_parameters())
    known = {n: own[n].detach().cpu().numpy() for n in names if n in own} | dict(values)
    weight = known[names[0]].astype(np.float64)
    bias = known.get(names[1], np.zeros(linear.out)).astype(np.float64)
    start = 0
    for site in linear.sites:
        rows = slice(start, start + site.out)
        start += site.out
        if site.name in adapter.sites:
            change = adapter.change(site.name)
            weight[rows], bias[rows] = _changed(adapter, change, weight[rows], bias[rows])
    found = dict(zip(names, (weight, bias), strict=True))
    return {name: v for name, v in found.items() if name in own or v.any()}


def values_with(backbone: Backbone, adapter: Adapter) -> dict[str, Array]:
    """Parameter path -> its value with the adapter, of those that it replaces whole.

    Raises:
        AdapterError: the backbone has no such parameter, or one of another shape.
    """
    from hhdeploy.backbones.parameters import parameters_for

    found = parameters_for(backbone.model, adapter.values, adapter.source)
    frozen = {path: old.detach().double().cpu().numpy() for path, old in found.items()}
    return {path: adapter.replaced(path, value) for path, value in frozen.items()}


def logits_with(
    backbone: Backbone, parameters: dict[str, Array], images: NDArray[np.float32]
) -> NDArray[np.float64]:
    """Logits in float64 of the backbone with some parameters replaced."""
    import torch

    from hhdeploy.backbones.parameters import forgetting

    own = {n: p.detach().double() for n, p in backbone.model.named_parameters()}
    new = [name for name in parameters if name not in own]
    replaced = {name: torch.from_numpy(value) for name, value in parameters.items()}
    buffers = {
        n: b.double() if b.is_floating_point() else b for n, b in backbone.model.named_buffers()
    }
    with torch.no_grad(), forgetting(backbone.model), _with_places(backbone.model, new):
        found: NDArray[np.float64] = torch.func.functional_call(
            backbone.model, own | replaced | buffers, (torch.from_numpy(images).double(),)
        ).numpy()
    return found


@contextmanager
def _with_places(model: nn.Module, biases: Sequence[str]) -> Iterator[None]:
    """Zeros for biases that a model's Linears do not have, so that they can be replaced."""
    import torch

    places = []
    for name in biases:
        path, _, leaf = name.rpartition(".")
        places.append((model.get_submodule(path), leaf))
    try:
        for module, leaf in places:
            size = module.get_parameter(leaf.replace("bias", "weight")).shape[0]
            module.register_parameter(leaf, torch.nn.Parameter(torch.zeros(size)))
        yield
    finally:
        for module, leaf in places:
            module.register_parameter(leaf, None)


def values_of(model: nn.Module) -> dict[str, Array]:
    """All parameters of a model by path, float64."""
    return {n: p.detach().double().cpu().numpy() for n, p in model.named_parameters()}


def path_of_parameters(backbone: Backbone, linear: LinearSpec) -> tuple[str, str]:
    """Paths of a Linear's weight and bias."""
    module, weight, bias = parameters_of(backbone.model, linear.path)
    owner = next(path for path, other in backbone.model.named_modules() if other is module)
    return f"{owner}.{weight}", f"{owner}.{bias}"


def _changed(
    adapter: Adapter, change: SiteChange, weight: Array, bias: Array
) -> tuple[Array, Array]:
    weight = change.scales.of(weight)
    bias = bias if change.db is None else bias + change.db
    if change.delta is None:
        return weight, bias
    matrix = change.delta.dense()
    if adapter.form == "sequential":
        return matrix @ weight, matrix @ bias
    return weight + matrix, bias
