"""The classifier of a model, exchanged for an adapter's and put back."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.errors import AdapterError
from hhdeploy.training.wrapping import own_modules


@dataclass(frozen=True)
class OldHead:
    """What a model had before it got an adapter's classifier.

    Attributes:
        classifier: the module.
        attributes: (module, name, value) of what said how many classes it has.
    """

    classifier: nn.Module
    attributes: tuple[tuple[nn.Module, str, Any], ...]


def put_head(
    model: nn.Module, path: str, weight: Tensor, bias: Tensor, config: AdapterConfig
) -> OldHead:
    """Put a new classifier of an adapter in place; returns the old one for `restore_head`."""
    old: Any = model.get_submodule(path)
    head = nn.Linear(weight.shape[1], weight.shape[0])
    head = head.to(old.weight.device, old.weight.dtype)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.copy_(bias)
    replace_module(model, path, head)
    return OldHead(old, _tell_classes(model, path, len(weight), config))


def restore_head(model: nn.Module, path: str, old: OldHead) -> None:
    """The classifier as it was, in the type and the place that the model has now, and what the
    model says of it."""
    found = own_modules(model).get(path)
    now = None if found is None else next(found.parameters(), None)
    if now is not None:
        old.classifier.to(now.device, now.dtype)
    replace_module(model, path, old.classifier)
    for module, name, value in old.attributes:
        setattr(module, name, value)


def trained_head(
    modules: Mapping[str, nn.Module], path: str, classes: int | None
) -> tuple[Tensor, Tensor]:
    """Weight and bias of the classifier as it is now, of a model with these modules.

    Raises:
        AdapterError: it is no more what an adapter holds.
    """
    found: Any = modules.get(path)
    weight, bias = getattr(found, "weight", None), getattr(found, "bias", None)
    if (
        isinstance(weight, Tensor)
        and isinstance(bias, Tensor)
        and weight.ndim == 2
        and classes in (None, len(weight))
    ):
        return weight, bias
    shown = "nothing" if found is None else " ".join(str(found).split())
    raise AdapterError(
        f"{path}: expected the classifier that attach put there, a Linear of {classes} classes "
        f"with a bias, found {shown}. An adapter holds such a classifier alone: call attach on a "
        "new model, and train the classifier that it makes."
    )


def replace_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path of a model."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def _tell_classes(
    model: nn.Module, path: str, count: int, config: AdapterConfig
) -> tuple[tuple[nn.Module, str, Any], ...]:
    """Models of transformers compute their loss by what their configuration says of the classes."""
    names = config.class_names or tuple(f"LABEL_{i}" for i in range(count))
    changed: list[tuple[nn.Module, str, Any]] = []
    parts = path.split(".")
    for depth in range(len(parts)):
        module = model.get_submodule(".".join(parts[:depth]))
        if not hasattr(said := getattr(module, "config", None), "id2label"):
            continue
        # A copy: others may share the configuration.
        own: Any = deepcopy(said)
        own.id2label = dict(enumerate(names))
        own.label2id = {name: i for i, name in enumerate(names)}
        own.problem_type = config.problem_type
        new = {"config": own}
        if isinstance(getattr(module, "num_labels", None), int):
            new["num_labels"] = count
        for name, value in new.items():
            changed.append((module, name, getattr(module, name)))
            setattr(module, name, value)
    return tuple(changed)
