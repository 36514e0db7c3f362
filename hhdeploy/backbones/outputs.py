"""What a model returns, as one tensor."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hhdeploy.errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor, nn


def returns_tensor(model: nn.Module) -> nn.Module:
    """Make a model's call return a tensor, in place; its module paths stay as they are.

    A model of transformers returns an object: its ``logits`` are taken, of a model without a
    classifier its ``pooler_output``.
    """
    model.register_forward_hook(_as_tensor)
    return model


def _as_tensor(model: nn.Module, images: Any, output: Any) -> Tensor:
    from torch import Tensor

    if isinstance(output, Tensor):
        return output
    for name in ("logits", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found
    raise BackboneError(
        f"{type(model).__name__} returned {type(output).__name__}; expected a tensor, or an "
        "object with logits or pooler_output."
    )
