"""A float32 model computed in float64, one operation's weights in float64 at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

# Reading an attribute of a tensor changes nothing, and copies nothing.
_GETTER = "__get__"


class Float64(TorchFunctionMode):
    """While it is entered, torch's functions compute in float64 what they would in float32.

    Every float32 tensor that goes into a function is widened for that call, and every result
    stays float64: a model's parameters are as they were, and never all wide at once (``.double()``
    takes three times the memory of the weights). A type that a model names is widened too: where
    it computes a softmax "in float32", the reference does so in float64. Narrower types stay what
    they are.

    A tensor that the model changes in place has to be one that it computed, not a float32
    parameter or buffer: the change would reach a copy.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call ``func`` with its arguments widened; widen what it returns."""
        if getattr(func, "__name__", "") == _GETTER:
            return _wide(func(*args, **(kwargs or {})))
        if func is Tensor.float:
            func = Tensor.double
        return _wide(func(*_wide(args), **_wide(kwargs or {})))


def _wide(value: Any) -> Any:
    """float32 tensors, and the type itself, as float64, also in lists, tuples and dictionaries."""
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    if value is torch.float32:
        return torch.float64
    if isinstance(value, dict):
        return {key: _wide(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_wide(item) for item in value]
    if type(value) is tuple:
        return tuple(_wide(item) for item in value)
    return value
