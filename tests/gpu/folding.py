"""One adapter folded into a timm model's own weights, run by torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.exporters.fold import fold_additive, fold_sequential, folded_bias

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def products_in(precision: str) -> Iterator[None]:
    """float32 is multiplied as ``ieee`` has it on the GPU, or as ``tf32``."""
    import torch

    # Both of cuDNN: torch.export refuses to trace where convolutions and recurrences differ.
    kinds = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = precision
    try:
        yield
    finally:
        for kind, known in zip(kinds, before, strict=True):
            kind.fp32_precision = known


def folded_in_torch(spec: BackboneSpec, adapter: Adapter) -> nn.Module:
    """The backbone with the adapter in its weights and the adapter's own head; on the CPU."""
    import torch
    from torch import nn

    backbone = load_backbone(spec)
    model = backbone.model
    with torch.no_grad():
        for linear in backbone.facts.linears:
            _fold(model.get_submodule(linear.path), linear, adapter)
    if adapter.head is not None:
        parent, _, name = backbone.facts.classifier.rpartition(".")
        head = nn.Linear(adapter.head.weight.shape[1], adapter.head.weight.shape[0])
        values = {"weight": adapter.head.weight, "bias": adapter.head.bias}
        head.load_state_dict({key: torch.from_numpy(v) for key, v in values.items()})
        setattr(model.get_submodule(parent), name, head)
    return model.eval()


def _fold(module: nn.Module, linear: LinearSpec, adapter: Adapter) -> None:
    # Views: writing into them changes the model.
    weight, bias = module.weight.numpy(), None if module.bias is None else module.bias.numpy()
    start = 0
    for site in linear.sites:
        part = slice(start, start + site.out)
        start += site.out
        if site.name not in adapter.sites:
            continue
        delta = adapter.delta(site.name)
        if adapter.form == "additive":
            weight[part] = fold_additive(weight[part], delta)
        else:
            weight[part] = fold_sequential(weight[part], delta)
            if bias is not None:
                bias[...] = folded_bias(bias, delta)


def logits_in_torch(
    model: nn.Module, images: NDArray[np.float32], precision: str, device: str
) -> NDArray[np.float32]:
    """Images to torch's device, logits back; the model moves there in the precision."""
    import torch

    dtype = getattr(torch, precision)
    with torch.inference_mode():
        there = torch.from_numpy(images).to(device, dtype)
        found: NDArray[np.float32] = model.to(device, dtype)(there).float().cpu().numpy()
    return found
