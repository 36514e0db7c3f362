"""What of a model an adapter does not hold: it must be at the end what it was at the beginning."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hhdeploy.errors import AdapterError

# Name -> type and sha256 of a frozen parameter or a buffer.
FrozenTensors = Mapping[str, tuple[torch.dtype, str]]


def frozen_tensors(model: nn.Module) -> FrozenTensors:
    """Every parameter that requires no gradient, and every buffer that a state dict has."""
    # Under all its names: the sequential form has one transform of weight and bias.
    named = model.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    return {
        name: (tensor.dtype, _sha256(tensor))
        for name, tensor in model.state_dict().items()
        if name not in trained and not tensor.is_meta
    }


def check_frozen(model: nn.Module, before: FrozenTensors) -> None:
    """Compare a model with what it was.

    A tensor of another type was cast, which trains nothing: it is not compared.

    Raises:
        AdapterError: naming the first tensor that changed.
    """
    now = model.state_dict()
    changed = [
        name
        for name, (dtype, digest) in before.items()
        if name in now and now[name].dtype == dtype and _sha256(now[name]) != digest
    ]
    if changed:
        raise AdapterError(
            f"{changed[0]} is no more what it was when the adapter was attached (of {len(before)} "
            f"frozen tensors {len(changed)} have changed). The adapter does not hold it, so a "
            "bundle would not answer as this model does. Statistics of BatchNorm change in "
            "training mode: call eval() on those modules after every model.train(). Weights: give "
            "the optimizer the parameters that require gradients alone."
        )


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()
