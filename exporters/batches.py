"""Which Linears keep the images of a batch apart, found by trying.

A side branch is another one for every image, so it has to know which rows of a Linear's input are
whose: [batch, ..., features], or windows and tokens joined into the first dimension image after
image. A model may order them otherwise (tokens first), which shapes alone do not tell once they
are joined; and an input that no image reaches is the same for all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hhdeploy.backbones.structure import parameters_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import nn

    from hhdeploy.backbones.sites import LinearSpec

_SEED = 0
# Values of an input's halves that are looked at.
_SAMPLE = 4096
# What one image's rows may move by when only another image changed, of what those rows move by.
_SHARE = 1e-3


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
    return frozenset(
        path
        for path in ab
        if all(_apart(*inputs) for inputs in zip(ab[path], ac[path], cb[path], strict=True))
    )


def _apart(ab: torch.Tensor, ac: torch.Tensor, cb: torch.Tensor) -> bool:
    if not ab.numel():
        return False
    (a1, b1), (a2, _), (_, b2) = ab, ac, cb
    moved = float((ab - ac).abs().max()), float((ab - cb).abs().max())
    still = float((a1 - a2).abs().max()), float((b1 - b2).abs().max())
    return all(s <= _SHARE * m for s, m in zip(still, moved, strict=True)) and min(moved) > 0


def _inputs(
    model: nn.Module, linears: Sequence[LinearSpec], images: torch.Tensor
) -> dict[str, list[torch.Tensor]]:
    """Path -> what `_sample` takes of every use of a Linear, in the order of the uses."""
    import torch
    from torch.overrides import TorchFunctionMode

    paths: dict[int, str] = {}
    for linear in linears:
        module, weight, _ = parameters_of(model, linear.path)
        paths[id(getattr(module, weight))] = linear.path
    seen: dict[str, list[torch.Tensor]] = {}

    class Watch(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            if func is torch.nn.functional.linear:
                given = dict(zip(("input", "weight"), args, strict=False)) | (kwargs or {})
                path = paths.get(id(given["weight"]))
                if path is not None:
                    seen.setdefault(path, []).append(_sample(given["input"]))
            return func(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        model(images)
    return seen


def _sample(x: torch.Tensor) -> torch.Tensor:
    """Values of both halves of the first dimension, [2, values]; none where it has no halves."""
    import torch

    if x.dim() < 2 or x.shape[0] % 2:
        return x.new_empty(0)
    halves = x.reshape(2, -1)
    chosen = torch.randint(
        halves.shape[1], (_SAMPLE,), generator=torch.Generator().manual_seed(_SEED)
    )
    return halves[:, chosen.to(x.device)].clone()
