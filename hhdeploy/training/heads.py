"""The classifier of a model, exchanged for an adapter's and put back."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.outputs import check_exchangeable, no_classifier
from hhdeploy.backbones.structure import states_classifier
from hhdeploy.errors import AdapterError, BackboneError
from hhdeploy.training.wrapping import evaluated, own_modules, size_of_images


@dataclass(frozen=True)
class OldHead:
    """What a model had before it got an adapter's classifier.

    Attributes:
        classifier: the module.
        attributes: (module, name, value) of what said how many classes it has.
    """

    classifier: nn.Module
    attributes: tuple[tuple[nn.Module, str, Any], ...]


def check_place(model: nn.Module, facts: BackboneFacts, config: AdapterConfig) -> None:
    """Whether a new adapter's classifier has a place: an export compares the same, hours later.

    A guess is tried where the size of the images is known, and what the model states where the
    adapter is to have a classifier. A model that does not run on such alone here, or returns no
    logits, may do so where it is exported.

    Raises:
        AdapterError: the model has no classifier, and the adapter is to have one.
        BackboneError: the Linear that was taken for the classifier is none, or computes more.
    """
    if not facts.classifier:
        if config.num_classes is None:
            return
        raise AdapterError(
            f"{type(model).__name__} has no classifier: no Linear that stands alone at its end. A "
            "module can state which one it is, pretrained_cfg = {'classifier': 'PATH'}. Put a "
            "Linear behind the model in a module of your own; an adapter without classes "
            "(num_classes None) needs none."
        )
    if config.num_classes is not None:
        with evaluated(model):
            check_exchangeable(model, facts)
    size, stated = size_of_images(model, facts, config), config.num_classes is not None
    if size is None or (states_classifier(model) and not stated):
        return
    sized = replace(facts, preprocess=replace(facts.preprocess, input_size=size))
    fault = None
    with contextlib.suppress(Exception), evaluated(model):
        fault = no_classifier(model, sized, stated=stated)
    if fault is not None:
        raise BackboneError(fault)


def check_head(model: nn.Module, facts: BackboneFacts, adapter: Adapter) -> None:
    """Whether a trained adapter's classifier can take the place of the model's, if it has one.
    Raises `BackboneError`."""
    if adapter.head is not None:
        with evaluated(model):
            check_exchangeable(model, facts)


def put_head(
    model: nn.Module, path: str, weight: Tensor, bias: Tensor, config: AdapterConfig
) -> OldHead:
    """Put a new classifier of an adapter in place; returns the old one for `restore_head`."""
    old: Any = model.get_submodule(path)
    head = linear_of(weight, bias).to(old.weight.device, old.weight.dtype)
    replace_module(model, path, head)
    return OldHead(old, _tell_classes(model, path, len(weight), config))


def linear_of(weight: Tensor, bias: Tensor) -> nn.Linear:
    """A Linear that holds copies of these. Made without the random values that torch begins with:
    those would be taken from the caller's generator."""
    classes, dim = weight.shape
    made = nn.Linear(dim, classes, device="meta", dtype=weight.dtype).to_empty(device=weight.device)
    with torch.no_grad():
        made.weight.copy_(weight)
        made.bias.copy_(bias)
    return made


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
