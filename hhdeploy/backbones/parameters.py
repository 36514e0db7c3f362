"""Parameters of a backbone that an adapter replaces whole: norms, convolutions, dense weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hhdeploy.errors import AdapterError


def put_values(
    model: nn.Module, values: Mapping[str, NDArray[np.floating]], source: str
) -> dict[str, nn.Parameter]:
    """Replace parameters of a model, in place, by new frozen ones.

    The old ones are kept, not written over: a graph traced before or after shares the memory of
    the parameters it was traced with.

    Args:
        model: any module.
        values: parameter path -> its new value, which gets the type of the old one.
        source: the adapter that they come from, for messages.

    Returns:
        Path -> the old parameter, for `restore_values`.

    Raises:
        AdapterError: no such parameter, or one of another shape; the model is as it was.
    """
    old = parameters_for(model, values, source)
    for path, value in values.items():
        new = torch.from_numpy(value).to(old[path].device, old[path].dtype)
        _exchange(model, old[path], nn.Parameter(new, requires_grad=False))
    if old:
        forget(model)
    return old


def parameters_for(
    model: nn.Module, values: Mapping[str, NDArray[np.floating]], source: str
) -> dict[str, nn.Parameter]:
    """Path -> the model's own parameter, of those that values replace.

    Raises:
        AdapterError: see `put_values`.
    """
    known = dict(model.named_parameters())
    for path, value in values.items():
        if path not in known:
            raise AdapterError(
                f"{source}: {path}.value: the model has no parameter {path}. The adapter belongs "
                "to another architecture."
            )
        if tuple(known[path].shape) != value.shape:
            raise AdapterError(
                f"{source}: {path}.value: expected shape {list(known[path].shape)}, found "
                f"{list(value.shape)}."
            )
    return {path: known[path] for path in values}


def restore_values(model: nn.Module, old: Mapping[str, nn.Parameter]) -> None:
    """Put the parameters back that `put_values` replaced, in the type that the model has now."""
    for path, parameter in old.items():
        new = model.get_parameter(path)
        parameter.data = parameter.data.to(new.device, new.dtype)
        _exchange(model, new, parameter)
    if old:
        forget(model)


def _exchange(model: nn.Module, old: nn.Parameter, new: nn.Parameter) -> None:
    """Wherever a model has a parameter: modules may share one."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter is old:
                setattr(module, name, new)


def forget(model: nn.Module) -> None:
    """Have a model drop what it computed of its parameters and keeps in eval mode, as LeViT and
    TinyViT keep their biases by position: such modules do so when they are put in training mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    model.train(modes[0][1])  # some compute it anew here
    for module, mode in modes:
        module.training = mode


@contextmanager
def forgetting(model: nn.Module) -> Iterator[None]:
    """`forget` before the block and behind it: of other values, or in another type."""
    forget(model)
    try:
        yield
    finally:
        forget(model)


@contextmanager
def values_in(
    model: nn.Module, values: Mapping[str, NDArray[np.floating]], source: str
) -> Iterator[None]:
    """The model with some parameters replaced, and as it was afterwards."""
    old = put_values(model, values, source)
    try:
        yield
    finally:
        restore_values(model, old)


def original_parameter(model: nn.Module, path: str) -> Tensor:
    """A parameter itself, also where a parametrization stands in front of it."""
    owner, _, name = path.rpartition(".")
    return original_of(model.get_submodule(owner), name)


def original_of(module: nn.Module, name: str) -> Tensor:
    """As `original_parameter`, of a module's own parameter."""
    if torch.nn.utils.parametrize.is_parametrized(module, name):
        chain: Any = module.parametrizations[name]  # type: ignore[index]
        original: Tensor = chain.original
        return original
    return module.get_parameter(name)
