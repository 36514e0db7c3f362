"""Which Linears keep the images of a batch apart, found by trying; and that it may be any number.

A side branch is another one for every image, so it has to know which rows of a Linear's input are
whose: [batch, ..., features], or windows and tokens joined into the first dimension image after
image. A model may order them otherwise (tokens first), which shapes alone do not tell once they
are joined. An input that no image reaches (a class token's, before it looks at the image), or
hardly, shows nothing: it is apart where its first dimension is the batch itself.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.structure import parameters_of
from hhdeploy.errors import BackboneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir
    import torch
    from torch import nn

    from hhdeploy.backbones.sites import LinearSpec

_SEED = 0
# Values of an input's halves that are looked at.
_SAMPLE = 4096
# What one image's rows may move by when only another image changed, of what those rows move by.
_SHARE = 1e-3
# What a product calls its sides.
_FACTORS = ("input", "other")


def images_apart(
    model: nn.Module, linears: Sequence[LinearSpec], shape: Sequence[int]
) -> frozenset[str]:
    """Paths of the Linears whose inputs hold the images of a batch one after the other.

    Three pairs of images: (a, b), (a, c) and (c, b). Where the images are kept apart, the first
    half of an input changes with the first image alone, and the second with the second.

    Args:
        model: in eval mode; attention in the form that is traced.
        linears: which to look at; one that is never called is not apart.
        shape: (channels, height, width) of the images.
    """
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    a, b, c = torch.randn(3, *shape, generator=generator)
    pairs = (torch.stack((a, b)), torch.stack((a, c)), torch.stack((c, b)))
    ab, ac, cb = (_inputs(model, linears, images) for images in pairs)
    apart, undecided = set(), {}
    for path in ab:
        uses = [_Use(*inputs) for inputs in zip(ab[path], ac[path], cb[path], strict=True)]
        if all(use.apart for use in uses):
            apart.add(path)
        elif all(use.apart or use.undecided for use in uses):
            undecided[path] = uses
    if undecided:
        # Two rows may be two tokens by chance; of three images that would be two still.
        abc = _inputs(model, linears, torch.stack((a, b, c)))
        apart |= {
            path
            for path, uses in undecided.items()
            if all(use.apart or three.rows == 3 for use, three in zip(uses, abc[path], strict=True))
        }
    return frozenset(apart)


def batch_shapes(model: nn.Module, batch: Any) -> tuple[Any, ...]:
    """torch.export's ``dynamic_shapes`` of a call with images alone; where a model takes any
    arguments (PEFT's, a wrapper's), they are one tuple.

    Args:
        model: that is called.
        batch: the dimension's symbol.
    """
    shapes = ({0: batch},)
    first = next(iter(inspect.signature(model.forward).parameters.values()), None)
    several = first is not None and first.kind is inspect.Parameter.VAR_POSITIONAL
    return (shapes,) if several else shapes


def check_batch(model: ir.Model, name: str) -> None:
    """A traced graph takes any number of images: a size that the model's code read as a number
    (``len(images)``) would be in it for good.

    Raises:
        BackboneError: the graph takes, or gives, the example's number of images alone.
    """
    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and isinstance(value.shape[0], int):
            raise BackboneError(
                f"{name}: traced with a dynamic batch, {value.name} has the shape {value.shape}: "
                "the model's code fixes the number of images. Use images.shape[0] there, not "
                "len(images), and make no decision by it."
            )


@dataclass(frozen=True, eq=False)
class _Input:
    """What is kept of a Linear's input: its first dimension, and values of both halves."""

    rows: int
    halves: torch.Tensor


class _Use:
    """The input of one use of a Linear in the three runs."""

    def __init__(self, ab: _Input, ac: _Input, cb: _Input) -> None:
        moved = _movement(ab, ac), _movement(ab, cb)
        # Of the half whose image stayed.
        still = _movement(ab, ac, half=0), _movement(ab, cb, half=1)
        self.apart = min(moved) > 0 and all(
            s <= _SHARE * m for s, m in zip(still, moved, strict=True)
        )
        # An image moves its own rows by nothing or too little to show: the shapes have to tell.
        self.undecided = ab.rows == 2 and max(still) == 0


def _movement(one: _Input, other: _Input, half: int | slice = slice(None)) -> float:
    change = (one.halves[half] - other.halves[half]).abs()
    return float(change.max()) if change.numel() else 0.0


def _inputs(
    model: nn.Module, linears: Sequence[LinearSpec], images: torch.Tensor
) -> dict[str, list[_Input]]:
    """Path -> what is kept of the input of every use of a Linear, in the order of the uses."""
    import torch
    from torch.overrides import TorchFunctionMode

    paths: dict[tuple[int, torch.Size, tuple[int, ...]], str] = {}
    for linear in linears:
        module, name, _ = parameters_of(model, linear.path)
        weight = getattr(module, name)
        paths[_place(weight)] = paths[_place(weight.T)] = linear.path
    seen: dict[str, list[_Input]] = {}
    linear_or_by_hand = {
        torch.nn.functional.linear: ("input", "weight"),  # x Wᵀ, also written as x @ W.T
        **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__), _FACTORS),
        **dict.fromkeys((torch.mm, torch.Tensor.mm), ("input", "mat2")),
    }

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if (names := linear_or_by_hand.get(func)) is not None:
                given = dict(zip(names, args, strict=False)) | (kwargs or {})
                x, factor = (given.get(name) for name in names)
                path = paths.get(_place(factor)) if isinstance(factor, torch.Tensor) else None
                if path is not None and isinstance(x, torch.Tensor):
                    seen.setdefault(path, []).append(_Input(x.shape[0], _sample(x)))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(images)
    return seen


def _place(matrix: torch.Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """What a weight and its views that are the same matrix (detached, transposed twice) share."""
    return matrix.data_ptr(), matrix.shape, matrix.stride()


def _sample(x: torch.Tensor) -> torch.Tensor:
    """Values of both halves of the first dimension, [2, values]; none where it has no halves."""
    import torch

    if x.dim() < 2 or x.shape[0] % 2:
        return x.new_empty(2, 0)
    halves = x.reshape(2, -1)
    chosen = torch.randint(
        halves.shape[1], (_SAMPLE,), generator=torch.Generator().manual_seed(_SEED)
    )
    return halves[:, chosen.to(x.device)]  # a copy: indices make no view
