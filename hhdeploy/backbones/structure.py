"""The structure of a loaded model: its Linears, its classifier, the digest of its weights.

The same rules for every model, so that a training that has only the module and an export that has
its source too find the same sites.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING

from hhdeploy.backbones.sites import PACKED, LinearSpec, kind_of, linear_spec
from hhdeploy.errors import BackboneError

if TYPE_CHECKING:
    from torch import Tensor, nn

# Left out of the digests: what differs between tasks (classifier), is resampled to the image
# size, or follows from the architecture (buffers).
_RESAMPLED = ("pos_embed", "relative_position", "rel_pos")
# Buffers that decide nothing, or that follow from the architecture and the images' size; older
# versions of timm and transformers have the latter in the state dict.
_UNBOUND = ("num_batches_tracked", "position_ids", "attn_mask", "bias_idxs")

# Where torch has the modules of models that it quantised, or prepared for it.
_QUANTISED = "torch.ao.nn."


def check_values(model: nn.Module) -> None:
    """Raise `BackboneError` for a model that has not got all of its values yet."""
    from torch.nn.parameter import is_lazy

    for path, tensor in chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise BackboneError(
                f"{type(model).__name__}: {path}: expected a tensor with values, found one of a "
                "lazy module that has not run yet. Call the model once on images as it takes "
                "them, or say the size there (Linear for LazyLinear)."
            )


def bare_model(model: nn.Module) -> nn.Module:
    """The model itself, which `torch.compile` and data parallelism wrap."""
    from torch import nn

    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def quantised_part(model: nn.Module) -> str | None:
    """What is expected instead of a part that torch quantised, or prepared for it; None if none
    is."""
    for path, module in model.named_modules():
        if type(module).__module__.startswith(_QUANTISED):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            return (
                f"{path}: expected a module with the weights that were trained, found {kind}, "
                "which quantises"
            )
    return None


def find_linears(model: nn.Module, classifier: str | None = None) -> tuple[LinearSpec, ...]:
    """The Linears that adapters can change, in registration order: all but the classifier.

    A ``nn.MultiheadAttention`` whose q, k and v share one weight has it as ``<path>.in_proj``.

    Args:
        model: the model.
        classifier: its path; None: `classifier_path`.
    """
    from torch import nn

    head = classifier_path(model) if classifier is None else classifier
    found = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            width = module.embed_dim
            found.append(linear_spec(f"{path}.{PACKED}", 3 * width, width))
        elif isinstance(module, nn.Linear) and path != head and "rel_pos" not in path:
            # "rel_pos": makes a table of positions, not from the image
            out, in_ = module.out_features, module.in_features
            found.append(linear_spec(path, out, in_, thirds=_in_thirds(model, path)))
    return tuple(found)


def with_own_weights(model: nn.Module, linears: Iterable[LinearSpec]) -> tuple[LinearSpec, ...]:
    """Those of some Linears whose weight no other module has: a graph has one weight for all of
    them, and an adapter changes one."""
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(id(parameter), set()).add(id(module))
    found = []
    for linear in linears:
        module, weight, _ = parameters_of(model, linear.path)
        own = dict(module.named_parameters(recurse=False)).get(weight)
        if own is None or len(holders[id(own)]) == 1:
            found.append(linear)
    return tuple(found)


def _in_thirds(model: nn.Module, path: str) -> bool:
    """Whether the rows of a fused qkv are all of q, then all of k, then all of v.

    MaxViT and TinyViT keep q, k and v together head by head, and the global blocks of GCViT
    have k and v only: their thirds would not be what their names say.
    """
    attention = model.get_submodule(path.rpartition(".")[0])
    head_by_head = getattr(attention, "head_first", False) or hasattr(attention, "val_dim")
    return not (head_by_head or getattr(attention, "use_global", False))


def parameters_of(model: nn.Module, path: str) -> tuple[nn.Module, str, str]:
    """The module that holds a Linear's parameters, and what weight and bias are called there."""
    from torch import nn

    owner = path.removesuffix(f".{PACKED}")
    if owner != path and isinstance(module := model.get_submodule(owner), nn.MultiheadAttention):
        return module, "in_proj_weight", "in_proj_bias"
    return model.get_submodule(path), "weight", "bias"


def classifier_path(model: nn.Module) -> str:
    """Path of the classifier: what the model states, as timm's do, else the last Linear unless it
    is one of many, which is a guess (`hhdeploy.backbones.outputs.no_classifier`).

    "" if there is none, as in timm's models with ``num_classes=0``, or those of transformers whose
    class is not of a classification: their last Linear projects features, or pools tokens.

    Raises:
        BackboneError: timm names several classifiers, or one that is no Linear.
    """
    from torch import nn

    if states_classifier(model):
        return _stated_classifier(model)
    if _gives_features(model):
        return ""
    linears = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not linears or kind_of(linears[-1]) or "pooler" in linears[-1].split("."):
        return ""
    alike = [path for path in linears if _pattern(path) == _pattern(linears[-1])]
    return linears[-1] if len(alike) == 1 else ""


def _gives_features(model: nn.Module) -> bool:
    kind = type(model)
    return kind.__module__.startswith("transformers.models.") and (
        "Classification" not in kind.__name__
    )


def states_classifier(model: nn.Module) -> bool:
    """Whether a model itself says which module is its classifier, in timm's ``pretrained_cfg``."""
    # A module of the user's may state its image transform there, and no more.
    return not {"architecture", "classifier"}.isdisjoint(getattr(model, "pretrained_cfg", ()))


def states_transform(model: nn.Module) -> bool:
    """Whether a model itself says how its images are made, in timm's ``pretrained_cfg``."""
    # A module of the user's may state its classifier there, and no more.
    return not {"architecture", "mean"}.isdisjoint(getattr(model, "pretrained_cfg", ()))


def _pattern(path: str) -> str:
    """A path with its numbers left open: the Linears of a stack of blocks have the same one."""
    return re.sub(r"\b\d+\b", "*", path)


def _stated_classifier(model: nn.Module) -> str:
    from torch import nn

    path = getattr(model, "pretrained_cfg", {}).get("classifier")
    if not isinstance(path, str):
        raise BackboneError(
            f"{type(model).__name__}: expected one classifier, as an adapter has, timm names "
            f"{path!r}. Let a function, python:MODULE:FUNCTION, return the model: for adapters "
            "without classes with pretrained_cfg = {**model.pretrained_cfg, 'classifier': ''}, for "
            "those with classes in a module that has one Linear at its end."
        )
    module = dict(model.named_modules()).get(path)
    if not path or isinstance(module, nn.Identity):
        return ""
    if not isinstance(module, nn.Linear):
        raise BackboneError(
            f"{type(model).__name__}: the classifier {path} is {type(module).__name__}; expected a "
            "Linear. Let a function, python:MODULE:FUNCTION, return the model with "
            "pretrained_cfg = {**model.pretrained_cfg, 'classifier': 'PATH'}, of the Linear in it "
            "that the logits are the output of, or '' where there is none."
        )
    return path


def base_sha256(model: nn.Module, classifier: str) -> str:
    """Digest of the frozen weights: what an adapter was trained on.

    sha256 over the sorted (name, dtype, shape, little-endian bytes) of the state dict without
    classifier, position embeddings, relative-position tables and buffers. float64 is digested as
    the float32 that it is loaded as.
    """
    return _digest(_frozen(model.named_parameters(), classifier))


def buffers_sha256(model: nn.Module, classifier: str) -> str:
    """Digest of the buffers that a checkpoint holds, which decide what the weights compute:
    statistics of BatchNorm, norms that are frozen for good, a mask or a scale of one's own.

    As `base_sha256`, of the state dict's buffers; without the number of batches that BatchNorm
    counted, which no answer depends on, indices of positions and masks of windows. Buffers of no
    state dict are made by code, with rounding of the processor's own, and are in no digest. Of a
    model without any it is `NO_BUFFERS`.
    """
    stored = model.state_dict().keys()
    # Under all its names: a copy of the model need not share what the model shares.
    named = model.named_buffers(remove_duplicate=False)
    decisive = ((n, b) for n, b in named if n in stored and not is_table(n))
    return _digest(_frozen(decisive, classifier))


def is_table(buffer: str) -> bool:
    """Whether a buffer is called what follows from the architecture, or decides no answer."""
    return buffer.endswith(_UNBOUND) or any(part in buffer for part in _RESAMPLED)


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        if tensor.dtype == torch.float64:
            tensor = tensor.float()
        kind = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{kind}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def signs_sha256(model: nn.Module, classifier: str) -> str:
    """Digest of the signs of the same weights, which no rounding to another type changes.

    What binds an adapter that was trained on a model in bfloat16 or float16: sha256 over the
    sorted (name, shape, a bit for each value, set where it is negative).
    """
    import numpy as np

    digest = hashlib.sha256()
    for name, tensor in _frozen(model.named_parameters(), classifier):
        digest.update(f"{name}\0{tuple(tensor.shape)}\0".encode())
        digest.update(np.packbits(np.signbit(tensor.float().cpu().numpy())).data)
    return digest.hexdigest()


def _frozen(named: Iterable[tuple[str, Tensor]], classifier: str) -> Iterator[tuple[str, Tensor]]:
    """What the digests are of, sorted by name."""
    for name, tensor in sorted(named, key=lambda item: item[0]):
        if not name.startswith(f"{classifier}.") and not any(part in name for part in _RESAMPLED):
            yield name, tensor.detach()
