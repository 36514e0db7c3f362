"""``--model``: one frozen model, from timm, from transformers, or from a function of your own."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING

from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.outputs import computing
from hhdeploy.backbones.spec import Backbone, BackboneSpec, Loaded
from hhdeploy.backbones.structure import (
    base_sha256,
    buffers_sha256,
    find_linears,
    signs_sha256,
    with_own_weights,
)
from hhdeploy.errors import BackboneError, require
from hhdeploy.files.tensors import check_finite

if TYPE_CHECKING:
    from torch import nn

_SOURCES = ("transformers:", "python:")


def load_backbone(spec: BackboneSpec) -> Backbone:
    """Load a model, frozen, in eval mode and float32; see `BackboneSpec` for the sources.

    Raises:
        BackboneError: the model does not exist, its weights do not fit, or its structure is none
            that adapters can change.
        MissingDependencyError: the source's package is not installed.
    """
    require("torch", "export", "loading a backbone")
    if not spec.model.startswith(_SOURCES):
        from hhdeploy.backbones.timm import named_as_timm_does

        spec = named_as_timm_does(spec)
    loaded = _load(spec)
    model = loaded.model.eval().requires_grad_(False).float()
    file = spec.checkpoint
    _check_finite(model, loaded.name if file is None else f"`checkpoint`: {file}")
    return Backbone(model, _facts(loaded, spec), loaded.notes, loaded.traced_with)


def _check_finite(model: nn.Module, where: str) -> None:
    """Every weight is a number. Buffers are left out: a mask may be of infinities."""
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise BackboneError(
                f"{where}: {name}: expected a tensor with values, found one of torch's meta "
                "device, which has none. Make the model on the CPU, and load its weights there."
            )
    for name, weight in model.named_parameters():
        check_finite(weight.numpy(), f"{where}: {name}", BackboneError)


def _load(spec: BackboneSpec) -> Loaded:
    source, separator, name = spec.model.partition(":")
    if separator and source == "transformers":
        from hhdeploy.backbones.transformers import load_transformers

        return load_transformers(spec, name)
    if separator and source == "python":
        from hhdeploy.backbones.module import load_module

        return load_module(spec, name)
    from hhdeploy.backbones.timm import load_timm

    return load_timm(spec)


def _facts(loaded: Loaded, spec: BackboneSpec) -> BackboneFacts:
    from torch import nn

    model, path = loaded.model, loaded.classifier
    classifier = model.get_submodule(path) if path else None
    if classifier is not None and not isinstance(classifier, nn.Linear):
        raise BackboneError(
            f"{loaded.name}: the classifier {path} is no Linear: expected one at the end of the "
            "model."
        )
    return BackboneFacts(
        model=loaded.name,
        args=dict(spec.args),
        sha256=base_sha256(model, path),
        signs=signs_sha256(model, path),
        buffers=buffers_sha256(model, path),
        linears=with_own_weights(model, find_linears(model, path)),
        classifier=path,
        dim=_features(loaded) if classifier is None else classifier.in_features,
        classes=loaded.classes,
        preprocess=loaded.preprocess,
        license=loaded.license,
        meaning=loaded.meaning,
        extra={"assumed": list(loaded.notes)} if loaded.notes else {},
    )


def _features(loaded: Loaded) -> int:
    """How many features a model without a classifier gives an image.

    Raises:
        BackboneError: it does not compute on images alone, or returns no [batch, features].
    """
    import torch

    images = torch.zeros(1, *loaded.preprocess.input_size)
    with computing(loaded.name, images.shape), torch.no_grad():
        found = loaded.model(images)
    if found.ndim != 2:
        raise BackboneError(
            f"{loaded.name}: no classifier was found, and what it returns is {list(found.shape)}: "
            "expected [batch, features]."
        )
    return int(found.shape[1])
