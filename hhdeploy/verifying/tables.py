"""What a graph holds that is no parameter of its model: what the model computes without images.

Tables of relative positions and of angles (RoPE), masks, indices, and weights and biases that the
tracer has put in order: a graph holds them under names of the tracer's. The model computes them at
each call, so the call is watched, and every table looked for among what its operations return.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hhdeploy.backbones.attention import plain_attention
from hhdeploy.backbones.parameters import forgetting
from hhdeploy.backbones.spec import Backbone
from hhdeploy.parity import ROW_BOUND


def shares(backbone: Backbone, tables: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """Name -> the largest part of a table's numbers that one tensor of the model has, in order.

    Args:
        backbone: the model, with the parameters that the tables are computed from.
        tables: by name, of any shape: their numbers are compared as they lie, row by row.
    """
    model, watch = backbone.model, _Watch(tables)
    for tensor in (*model.parameters(), *model.buffers(), *_made_by_the_tracer(model)):
        watch.look(tensor)
    images = torch.zeros(2, *backbone.facts.preprocess.input_size)
    with torch.no_grad(), plain_attention(model), forgetting(model), watch:
        model(images)
    return watch.shares


class _Watch(TorchFunctionMode):
    """Compares what every operation returns with the tables of as many numbers."""

    def __init__(self, tables: Mapping[str, NDArray[Any]]) -> None:
        super().__init__()
        self.shares = dict.fromkeys(tables, 0.0)
        self._tables = {name: table.reshape(-1) for name, table in tables.items()}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Call ``func``, and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.look(tensor)
        return result

    def look(self, tensor: torch.Tensor) -> None:
        """Compare one tensor."""
        if tensor.dtype == torch.bfloat16:  # which NumPy has not
            return
        for name, table in self._tables.items():
            if table.size == tensor.numel() and self.shares[name] < 1.0:
                share = float(alike(table, tensor.detach().numpy().reshape(-1)).mean())
                self.shares[name] = max(self.shares[name], share)


def alike(found: NDArray[Any], right: NDArray[Any]) -> NDArray[np.bool_]:
    """Which numbers are those that they have to be, within rounding."""
    bound = ROW_BOUND * float(np.max(np.abs(right[np.isfinite(right)]), initial=0.0))
    same: NDArray[np.bool_] = np.isclose(found, right, rtol=ROW_BOUND, atol=bound, equal_nan=True)
    return same


def _made_by_the_tracer(model: nn.Module) -> Iterator[torch.Tensor]:
    """Matrices transposed, and what a BatchNorm adds, which a convolution without a bias gets as
    one."""
    yield from (p.T for p in model.parameters() if p.ndim == 2)
    for m in model.modules():
        if isinstance(m, _BatchNorm) and (mean := m.running_mean) is not None:
            yield functional.batch_norm(
                torch.zeros(1, len(mean)), mean, m.running_var, m.weight, m.bias, eps=m.eps
            )
