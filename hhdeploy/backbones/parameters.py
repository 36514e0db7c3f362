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
    model: nn.Module, values: Mapping[str, NDArray[np.float32]], source: str
) -> dict[str, Tensor]:
    """Replace parameters of a model, in place.

    Args:
        model: any module.
        values: parameter path -> its new value.
        source: the adapter that they come from, for messages.

    Returns:
        Path -> the old value, for `restore_values`.

    Raises:
        AdapterError: no such parameter, or one of another shape; the model is as it was.
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
    old = {path: known[path].detach().clone() for path in values}
    restore_values(model, {path: torch.from_numpy(value) for path, value in values.items()})
    return old


def restore_values(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Copy values into parameters, in place; they are frozen afterwards."""
    with torch.no_grad():
        for path, value in values.items():
            model.get_parameter(path).copy_(value).requires_grad_(False)


@contextmanager
def values_in(
    model: nn.Module, values: Mapping[str, NDArray[np.float32]], source: str
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
    module: Any = model.get_submodule(owner)
    if torch.nn.utils.parametrize.is_parametrized(module, name):
        original: Tensor = module.parametrizations[name].original
        return original
    return model.get_parameter(path)
