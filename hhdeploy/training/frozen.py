"""What of a model an adapter does not hold: it must be at the end what it was at the beginning."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hhdeploy.backbones.weights import without_wrappers
from hhdeploy.errors import AdapterError
from hhdeploy.parity import AVERAGING_BOUND

# Sums of a sketch: the norm of a difference is met within some 10 per cent.
_SUMS = 64


@dataclass(frozen=True)
class FrozenTensor:
    """What is kept of a frozen parameter or a buffer, instead of a second copy of the model.

    Attributes:
        dtype: its type.
        sha256: of its bits.
        sketch: tells by how much a changed one differs, see `_sketch`; None: any change counts.
    """

    dtype: torch.dtype
    sha256: str
    sketch: Tensor | None

    def holds(self, now: Tensor) -> bool:
        """True while ``now`` has the same values, but for what averaging them rounds away.

        One of another floating-point type was cast, which trains nothing: it may also differ by
        what that type rounds.
        """
        cast = now.dtype != self.dtype
        if not cast and _sha256(now) == self.sha256:
            return True
        if self.sketch is None or not now.is_floating_point():
            return cast
        norm = float(torch.linalg.vector_norm(self.sketch))
        difference = float(torch.linalg.vector_norm(_sketch(now) - self.sketch))
        return difference <= AVERAGING_BOUND * norm + (_rounded(now, norm) if cast else 0.0)


def _rounded(now: Tensor, norm: float) -> float:
    """The norm of what a cast to the type of ``now`` rounds at most."""
    kind = torch.finfo(now.dtype)
    # Values near 0 (a fresh class token) are rounded to the type's smallest step.
    return kind.eps * (norm + kind.smallest_normal * math.sqrt(now.numel()))


FrozenTensors = Mapping[str, FrozenTensor]


def frozen_tensors(model: nn.Module) -> FrozenTensors:
    """Every parameter that requires no gradient, and every buffer that a state dict has."""
    # Under all its names: modules may share one.
    named = model.named_parameters(remove_duplicate=False)
    trained = {name for name, parameter in named if parameter.requires_grad}
    return {
        name: FrozenTensor(tensor.dtype, _sha256(tensor), _finite_sketch(tensor))
        for name, tensor in model.state_dict().items()
        if name not in trained and not tensor.is_meta
    }


def check_frozen(model: nn.Module, before: FrozenTensors) -> None:
    """Compare a model with what it was.

    Raises:
        AdapterError: naming the first tensor that changed.
    """
    now = {without_wrappers(name): tensor for name, tensor in model.state_dict().items()}
    changed = [
        name for name, frozen in before.items() if name in now and not frozen.holds(now[name])
    ]
    if changed:
        raise AdapterError(
            f"{changed[0]} is no more what it was when the adapter was attached (of {len(before)} "
            f"frozen tensors {len(changed)} have changed). The adapter does not hold it, so a "
            "bundle would not answer as this model does. Statistics of BatchNorm change in "
            "training mode: call eval() on those modules after every model.train(). Weights: give "
            "the optimizer, or what averages them, the parameters that require gradients alone."
        )


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _finite_sketch(tensor: Tensor) -> Tensor | None:
    """None of what is no number, e.g. indices or a mask of infinities."""
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
        return None
    return _sketch(tensor)


def _sketch(tensor: Tensor) -> Tensor:
    """Sums of the values under random signs, every value in one of them, in float64.

    The distance of two tensors' sketches is about that of the tensors (a count sketch).
    """
    values = tensor.detach().cpu().reshape(-1).double()
    generator = torch.Generator().manual_seed(0)
    signs = torch.randint(2, values.shape, generator=generator, dtype=torch.int8) * 2 - 1
    padding = -len(values) % _SUMS
    return nn.functional.pad(values * signs, (0, padding)).reshape(-1, _SUMS).sum(0)
