"""ViTs in the arrays (.npz) that JAX's were published in: timm's reader, and what it does not say.

It takes of a file what the model has a place for, and makes sizes fit. What is left in the file,
what the model did not get, and how many heads its attention had are compared here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.backbones.structure import classifier_path
from hhdeploy.backbones.timm.geometry import told_resampled
from hhdeploy.backbones.weights import NO_WEIGHTS
from hhdeploy.errors import BackboneError, abbreviate
from hhdeploy.files.tensors import open_arrays

if TYPE_CHECKING:
    from torch import nn

# What stands before a file's names, as timm looks for it; beside those are the state of an
# optimizer, or a tower of texts.
_STARTS = ("opt/target/", "params/", "params/img/")
_PATCHES, _POSITIONS = "embedding/kernel", "pos_embedding"
# What timm fits to the size of the model's images and patches, and to their channels.
_FITTED_ARRAYS = (_PATCHES, _POSITIONS, "conv_root/kernel")
_FITTED = (
    *("pos_embed", "patch_embed.proj.weight", "embeds.proj.weight"),
    *("backbone.conv.weight", "backbone.stem.conv.weight"),
)
# A layer between the features and the classifier, which timm's models do not have.
_LAYER = "pre_logits/"
# In the place of every weight before the file is read: no weight is as large.
_UNREAD = 1.5e38
_FLOATS = "expected floating-point numbers that NumPy has: save bfloat16 as float32"
_ARGUMENTS = " Is it this model's, with these arguments?"

Arrays = Mapping[str, NDArray[Any]]


def load_arrays(
    spec: BackboneSpec, create: Callable[[BackboneSpec, int], nn.Module]
) -> tuple[nn.Module, int, list[str]]:
    """A model with the weights of a file of arrays, through the architecture's own reader.

    Args:
        spec: with the file as its checkpoint.
        create: the model without weights, of so many classes.

    Returns:
        The model, its classes (0: the file has no classifier), and lines about what was resampled
        and what was left out.

    Raises:
        BackboneError: the file cannot be read, is not of this architecture, or has more or less
            than the model.
    """
    path = spec.checkpoint
    assert path is not None
    fault = f"`checkpoint`: {path} does not fit {spec.model} with {dict(spec.args)}"
    try:
        with open_arrays(path) as arrays:
            start = next((s for s in _STARTS if f"{s}{_PATCHES}" in arrays), "")
            outlines = {name: _outline(array) for name, array in arrays.items()}
            own = {n.removeprefix(start): a for n, a in outlines.items() if n.startswith(start)}
            # What a classifier behind another layer says is nothing without that.
            behind = any(name.startswith(_LAYER) for name in own)
            own = {n: a for n, a in own.items() if not (behind and n.startswith((_LAYER, "head/")))}
            left = [name for name in outlines if name.removeprefix(start) not in own]
            untrue = [f"{n} ({a.dtype})" for n, a in own.items() if a.dtype.kind != "f"]
            if untrue:
                raise BackboneError(f"{fault}; {NO_WEIGHTS}: {abbreviate(untrue, 4)}; {_FLOATS}.")
            classes = len(own["head/bias"]) if "head/bias" in own else 0
            model = create(spec, classes or 1)
            head = f"{classifier_path(model)}."
            taken = {n for n, _ in model.named_parameters() if classes or not n.startswith(head)}
            _read(model, taken, spec, fault)
            _compare(own, model, taken, fault)
            said = _fitted(own, model, spec)
    except (OSError, ValueError, KeyError, AssertionError, RuntimeError, TypeError) as error:
        raise BackboneError(
            f"{fault}, or cannot be "
            f"read: {type(error).__name__}: {str(error).rstrip('.')}. Expected the arrays of a ViT "
            "as JAX published it; tensors by the model's own names go into a safetensors file."
        ) from error
    if left:
        said.append(f"left out of the checkpoint: {abbreviate(left, 4)}")
    return model, classes, said


def _outline(array: NDArray[Any]) -> NDArray[Any]:
    """An array of this shape and type that takes no memory."""
    return np.broadcast_to(np.empty((), array.dtype), array.shape)


def _read(model: nn.Module, taken: Collection[str], spec: BackboneSpec, fault: str) -> None:
    """Have timm read the file into the model.

    Raises:
        BackboneError: there is no reader, or some of the parameters to be ``taken`` got no values.
    """
    import torch

    reader = getattr(model, "load_pretrained", None)
    if reader is None:
        raise BackboneError(f"`checkpoint`: {spec.model} has no reader of .npz files.")
    found = {name: p for name, p in model.named_parameters() if name in taken}
    with torch.no_grad():
        for parameter in found.values():
            parameter.fill_(_UNREAD)
        reader(str(spec.checkpoint))
        unread = [n for n, p in found.items() if bool((p == torch.full_like(p, _UNREAD)).any())]
    if unread:
        raise BackboneError(f"{fault}; keys missing: {abbreviate(unread, 5)}.{_ARGUMENTS}")


def _compare(own: Arrays, model: nn.Module, taken: Collection[str], fault: str) -> None:
    """All of the file is in the parameters ``taken``: timm's reader says nothing of blocks that it
    passes over, of half a classifier, or of a layer that it has no place for.

    Raises:
        BackboneError: the file has more numbers than the model, or other heads.
    """
    given = {n: a.size for n, a in own.items() if not n.endswith(_FITTED_ARRAYS)}
    sizes = {n: p.numel() for n, p in model.named_parameters() if n in taken}
    expected = sum(size for n, size in sizes.items() if not n.endswith(_FITTED))
    if (total := sum(given.values())) != expected:
        blocks = {n.partition("/LayerNorm_0")[0] for n in given if "/LayerNorm_0" in n}
        raise BackboneError(
            f"{fault}: expected {expected:,} numbers beside the positions and the patches, found "
            f"{total:,} in {len(given)} arrays, {len(blocks)} blocks among them.{_ARGUMENTS}"
        )
    heads = {a.shape[-2] for n, a in own.items() if n.endswith("query/kernel")}
    said: list[Any] = [getattr(module, "num_heads", None) for module in model.modules()]
    mine = {number for number in said if isinstance(number, int)}
    if heads and heads != mine:
        raise BackboneError(
            f"{fault}: expected {_listed(mine)} heads of attention, found {_listed(heads)}."
            f"{_ARGUMENTS}"
        )


def _listed(numbers: Collection[int]) -> str:
    return " and ".join(map(str, sorted(numbers)))


def _fitted(own: Arrays, model: nn.Module, spec: BackboneSpec) -> list[str]:
    """Lines about what timm fitted to the size of the model's images and patches, and to their
    channels.

    Raises:
        BackboneError: nobody asked for another size than the file's.
    """
    parameters = {n: p for n, p in model.named_parameters() if n.endswith(_FITTED)}
    found = []
    for name, parameter in parameters.items():
        end = _POSITIONS if name.endswith("pos_embed") else _PATCHES
        array = next((a for n, a in own.items() if n.endswith(end)), None)
        if array is None or name.endswith("conv.weight"):
            continue
        same = array.size == parameter.numel()
        if end == _PATCHES:
            same = array.shape[:2] == tuple(parameter.shape[-2:])
        if not same:
            found.append(f"{name} from {list(array.shape)} to {list(parameter.shape)}")
    said = told_resampled(found, spec)
    if (channels := spec.args.get("in_chans", 3)) != 3:
        said.append(f"weights of images with 3 channels fitted to {channels}, as timm does")
    return said
