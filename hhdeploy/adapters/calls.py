"""Modules that a model passes by: it computes with their weights itself and never calls them.

timm's BEiT, EVA and Swin v2 with biases of q and v do so with their ``qkv``, torch's own attention
with its ``out_proj``. What PEFT puts around such a module does nothing, and added to its weight it
does something.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hhdeploy.errors import AdapterError, abbreviate

if TYPE_CHECKING:
    from torch import Tensor, nn

    from hhdeploy.backbones.spec import Backbone


def noise(count: int, backbone: Backbone) -> Tensor:
    """Images of seeded noise, float32."""
    import torch

    size = backbone.facts.preprocess.input_size
    return torch.randn(count, *size, generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def module_by_module() -> Iterator[None]:
    """torch computes a whole TransformerEncoderLayer from its weights where nothing is trained, and
    passes by what PEFT put around its Linears."""
    import torch

    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def never_called(modules: Mapping[str, nn.Module]) -> Iterator[list[str]]:
    """The names of the modules that are not called in it, once it is over."""
    called: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda module, _: called.add(module))
        for module in modules.values()
    ]
    found: list[str] = []
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
        found += [name for name, module in modules.items() if module not in called]


def check_called(backbone: Backbone, paths: Collection[str], file: Path) -> None:
    """The model calls the modules at ``paths``, or nothing computes with their weights.

    It holds for any values of the weights, as for those of a model that was not downloaded.

    Raises:
        AdapterError: naming those that it passes by.
    """
    import torch

    modules = {path: backbone.model.get_submodule(path) for path in paths}
    images = noise(1, backbone)
    with torch.no_grad(), module_by_module():
        with never_called(modules) as idle:
            backbone.model(images)
        if not idle:
            return
        # No number that is made of one that is none is a number.
        unknown = {
            f"{path}.weight": torch.full_like(modules[path].get_parameter("weight"), torch.nan)
            for path in idle
        }
        found = torch.func.functional_call(backbone.model, unknown, (images,))
    if not torch.isfinite(found).all():
        way = "Name such modules in exclude_modules and leave their tensors out of the file"
        raise passed_by(idle, file, "move the answers", f"{way}: it answers alike.")


def passed_by(paths: Collection[str], where: Path, effect: str, way: str) -> AdapterError:
    """What to say of an adapter on modules that the model passes by.

    Args:
        paths: of the modules.
        where: the file.
        effect: what it would do if it was merged into their weights.
        way: what to do.
    """
    return AdapterError(
        f"{where}: the model computes with the weight of {abbreviate(list(paths), 3)} without "
        "calling the module, so that PEFT's adapter there did nothing, in training either; merged "
        f"it would {effect}. {way}"
    )
