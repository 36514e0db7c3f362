"""What of a model an adapter does not hold: it must be at the end what it was at the beginning."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hhdeploy.backbones.facts import BaseAnswer
from hhdeploy.errors import AdapterError
from hhdeploy.files.checkpoints import without_wrappers
from hhdeploy.parity import AVERAGING_BOUND
from hhdeploy.training.wrapping import bare_answer

# Sums of a sketch: the norm of a difference is met within some 10 per cent.
_SUMS = 64


@dataclass(frozen=True, eq=False)
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


@dataclass(frozen=True)
class FrozenTensors:
    """What a model is while an adapter is attached, by the names of its tensors.

    Attributes:
        tensors: what the adapter does not hold.
        trained: what it holds.
        unstored: buffers of no state dict, which the adapter does not hold either. They may go, or
            get another shape: caches do, and are made again.
        shapes: of those.
    """

    tensors: Mapping[str, FrozenTensor] = field(default_factory=dict)
    trained: frozenset[str] = frozenset()
    unstored: Mapping[str, FrozenTensor] = field(default_factory=dict)
    shapes: Mapping[str, torch.Size] = field(default_factory=dict)


def frozen_tensors(model: nn.Module) -> FrozenTensors:
    """Every parameter that requires no gradient, and every buffer."""
    # Under all its names: modules may share one.
    named = model.named_parameters(remove_duplicate=False)
    trained = frozenset(name for name, parameter in named if parameter.requires_grad)
    stored = model.state_dict()
    others = {name: b for name, b in _buffers(model).items() if name not in stored}
    tensors, unstored = (
        {
            name: FrozenTensor(tensor.dtype, _sha256(tensor), _finite_sketch(tensor))
            for name, tensor in found.items()
            if name not in trained and not tensor.is_meta
        }
        for found in (stored, others)
    )
    shapes = {name: others[name].shape for name in unstored}
    return FrozenTensors(tensors, trained, unstored, shapes)


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    named = model.named_buffers(remove_duplicate=False)
    return {without_wrappers(name): buffer for name, buffer in named}


def check_frozen(
    model: nn.Module,
    before: FrozenTensors,
    classifier: str,
    answer: BaseAnswer | None,
    *,
    own: bool,
) -> None:
    """Compare a model with what it was.

    Args:
        model: as it is now.
        before: when the adapter was attached.
        classifier: its path; one that is gone is nobody's: features may be all that is wanted.
        answer: what the backbone computed of the fixed image; None: that is not known.
        own: whether the adapter brings one. A model without may get another from its user.

    Raises:
        AdapterError: naming the first tensor that changed or is gone, or that was added to be
            trained; or the backbone computes otherwise with the same tensors.
    """
    now = {without_wrappers(name): tensor for name, tensor in model.state_dict().items()}
    count = len(before.tensors)
    gone = [n for n in before.tensors if n not in now and not n.startswith(f"{classifier}.")]
    if gone:
        raise AdapterError(
            f"{gone[0]} is gone since the adapter was attached ({len(gone)} of {count} frozen "
            "tensors): a bundle, made of the model as it was, would answer otherwise. Put the "
            "modules back that were replaced or parametrized, or change them before attach."
        )
    if own and (new := _added(model, before, classifier)):
        raise AdapterError(
            f"{new[0]} requires gradients and came after the adapter was attached ({len(new)} such "
            "parameters), and no adapter holds it: a bundle would answer otherwise. Take what is "
            "for the training alone (another loss) off the model, or freeze it, and save again."
        )
    buffers = {n: b for n, b in _buffers(model).items() if before.shapes.get(n) == b.shape}
    now = {**buffers, **now}
    frozen_ones = {**before.unstored, **before.tensors}
    changed = [n for n, frozen in frozen_ones.items() if n in now and not frozen.holds(now[n])]
    if changed:
        raise AdapterError(
            f"{changed[0]} has changed since the adapter was attached ({len(changed)} of "
            f"{len(frozen_ones)} frozen tensors), and no adapter holds it: a bundle would answer "
            "otherwise. Statistics of BatchNorm change in training mode: call eval() on those "
            "modules after every model.train(). Weights: give the optimizer, or what averages "
            "them, the parameters that require gradients alone."
        )
    _check_answer(model, classifier, answer)


def _check_answer(model: nn.Module, classifier: str, known: BaseAnswer | None) -> None:
    """Compare what the backbone computes: attributes, hooks and modules without weights are no
    tensors. Raises `AdapterError`."""
    if known is None or (found := bare_answer(model, classifier, known.input_size)) is None:
        return
    distance = known.distance(found)
    if distance is not None and distance > (bound := known.bound(found)):
        raise AdapterError(
            "the backbone computes no more what it did when the adapter was attached, with the "
            f"same weights: its features of one fixed image differ by {distance:.2%} of their root "
            f"mean square, expected {bound:.1%} at most. The adapter does not hold what was "
            "changed since (pooling, an activation, a hook, an attribute), so a bundle would not "
            "answer as this model does. Change it back and save again, or change it before attach "
            "and train."
        )


def check_whole(model: nn.Module) -> None:
    """Raise `AdapterError` where this process has a part of a tensor alone (FSDP's)."""
    if not torch.distributed.is_available():  # a build of torch without it, as boards have
        return
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise AdapterError(
                f"{name}: expected a whole tensor, found a part of one (DTensor) in each process. "
                "Take whole ones, get_model_state_dict of torch.distributed.checkpoint.state_dict "
                "with StateDictOptions(full_state_dict=True, cpu_offload=True), load them into "
                "another model with an adapter attached alike, and save that one."
            )


def _added(model: nn.Module, before: FrozenTensors, classifier: str) -> list[str]:
    """Parameters that require gradients and came later, but for the classifier's."""
    known = {*before.tensors, *before.trained}
    named = model.named_parameters(remove_duplicate=False)
    trained = [without_wrappers(name) for name, parameter in named if parameter.requires_grad]
    return [n for n in trained if n not in known and not n.startswith(f"{classifier}.")]


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().tobytes()).hexdigest()


def _finite_sketch(tensor: Tensor) -> Tensor | None:
    """None of what is no number, e.g. indices or a mask of infinities."""
    if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.double()).all()):
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
