"""A model and its modules in what compiles, distributes or checkpoints it, or a part of it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from hhdeploy.backbones.weights import without_wrappers
from hhdeploy.errors import AdapterError

# Where torch has the modules of models that it quantised, or prepared for it.
_QUANTISED = "torch.ao.nn."


def bare_model(model: nn.Module) -> nn.Module:
    """The model itself, which `torch.compile` and data parallelism wrap."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def check_bare(model: nn.Module) -> None:
    """An adapter's sites are called what the modules of the model alone are called, and change
    weights that are numbers.

    Raises:
        AdapterError: the model is wrapped or quantised, or a part of it.
    """
    for path, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise AdapterError(
                f"{path}: expected a module with the weights that were trained, found {kind}, "
                "which quantises. Attach the adapter to the model as it was before; the bundle "
                "that is exported can be quantised."
            )
    paths = ((path, without_wrappers(path)) for path, _ in model.named_modules())
    wrapped = next((own for path, own in paths if own != path), None)
    if bare_model(model) is not model:
        what = f"{type(model).__name__} wraps the model"
    elif wrapped is not None:
        what = f"{wrapped or type(model).__name__}: a part of the model is wrapped"
    else:
        return
    raise AdapterError(
        f"{what}: attach the adapter to the model itself, and compile or wrap it after that."
    )


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by the paths that they have where no part of it is wrapped."""
    # What is in a wrapper comes after it.
    return {without_wrappers(path): module for path, module in model.named_modules()}


def check_places(places: Mapping[str, nn.Module], modules: Mapping[str, nn.Module]) -> None:
    """What an adapter changed is still where it was.

    Args:
        places: path -> module, when it was attached.
        modules: `own_modules` now.

    Raises:
        AdapterError: naming the first one that is not there.
    """
    moved = [path for path, module in places.items() if modules.get(path) is not module]
    if moved:
        found = "another one" if moved[0] in modules else "nothing"
        raise AdapterError(
            f"{moved[0]}: expected the module that the adapter was attached to, found {found} (of "
            f"{len(places)} such modules {len(moved)} are not in their places). The adapter would "
            "be saved without what was trained there: take off what wraps a part of the model, but "
            "for torch.compile and torch's checkpoint_wrapper, or call attach once all modules are "
            "in their places."
        )
