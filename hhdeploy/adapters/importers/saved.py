"""Parameters that a training saved whole, beside a method's own tensors: head, biases, norms.

Configuration and tensors are compared both ways: what ``modules_to_save`` and ``bias`` name must
be in the file, and what is in the file must be named.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.applying import path_of_parameters
from hhdeploy.adapters.importers.keys import numbers_filled, numbers_in, numbers_open
from hhdeploy.adapters.importers.lora import check_float, tuned_tensor
from hhdeploy.adapters.importers.naming import Names
from hhdeploy.adapters.importers.targets import in_saved_module, saved_in_saved
from hhdeploy.adapters.importers.template import Tensors
from hhdeploy.backbones.sites import kind_of
from hhdeploy.errors import AdapterError, abbreviate

if TYPE_CHECKING:
    import torch

    from hhdeploy.backbones.spec import Backbone

# What a raw state dict says between the path of a saved or wrapped module and its parameter.
_WRAPPED = re.compile(r"\.(modules_to_save|base_layer|original_module)(?=\.)")
_ORIGINAL = re.compile(r"\.original_module\.")
# What PEFT before 0.21 looked for anywhere in a name to find the biases that ``all`` trains: also
# BEiT's q_bias and Swin's relative_position_bias_table.
_BIAS = "bias"
# PEFT adds both to modules_to_save for these tasks; a model has one of them.
_ADDED = {"SEQ_CLS": {"classifier", "score"}, "TOKEN_CLS": {"classifier", "score"}}
_STATISTICS = ".running_mean"  # of batch norms
_UNSAVED = (
    "statistics of BatchNorm as the backbone's: PEFT saves none that moved while it was trained"
)


@dataclass(frozen=True, eq=False)
class Split:
    """The tensors of a file: those of a method, and parameters that were trained whole.

    Attributes:
        tuned: by the key of the file.
        whole: by the path of the backbone's parameter.
        notes: what the file does not say, and is assumed.
    """

    tuned: Tensors
    whole: dict[str, NDArray[np.float64]]
    notes: tuple[str, ...] = ()


def bare_key(key: str) -> str:
    """The parameter's own name, without what PEFT's wrappers put before its last component."""
    return _WRAPPED.sub("", key)


def head_of_file(
    keys: Mapping[str, NDArray[Any]], config: Mapping[str, Any], backbone: Backbone
) -> str | None:
    """Path of the classifier as the file calls it; None if it has none.

    Under the backbone's own name, or the one Linear of the right width that modules_to_save names
    or the keys mark, and that the backbone does not have.
    """
    facts = backbone.facts
    modules = dict(backbone.model.named_modules())
    found = set()
    for key, tensor in keys.items():
        owner, _, leaf = bare_key(key).rpartition(".")
        if leaf != "weight" or tensor.ndim != 2 or tuned_tensor(key) is not None:
            continue
        marked = bare_key(key) != key or in_saved_module(config, bare_key(key))
        if (
            owner == facts.classifier
            or owner.endswith(f".{facts.classifier}")
            or (marked and _may_be_head(owner, modules) and tensor.shape[1] == facts.dim)
        ):
            found.add(owner)
    return found.pop() if len(found) == 1 else None


def _may_be_head(owner: str, modules: Collection[str]) -> bool:
    """Whether a module that the backbone does not have may be a classifier: it is none of a
    block's Linears in another implementation's names."""
    return owner not in modules and not (kind_of(owner) and numbers_in(owner))


def split_saved(
    tensors: Tensors,
    head: str | None,
    names: Names,
    config: Mapping[str, Any],
    backbone: Backbone,
    file: Path,
) -> Split:
    """Separate a method's tensors from parameters that were trained whole.

    Args:
        tensors: of one adapter by `bare` key, without PEFT's prefix.
        head: path of the classifier in the file.
        names: how its other paths are to be read.
        config: of PEFT.
        backbone: the model.
        file: for messages.

    Raises:
        AdapterError: modules_to_save or bias and the tensors disagree, or a shape does, or a
            parameter is there twice, or a buffer is no more the backbone's.
    """
    thirds = _thirds(backbone) if names.translated else {}
    parameters = _parameters(backbone, thirds)
    buffers = dict(backbone.model.named_buffers())
    classifier = backbone.facts.classifier
    tuned: Tensors = {}
    same: set[str] = set()
    whole: dict[str, NDArray[np.float64]] = {}
    named: dict[str, str] = {}
    for key, tensor in tensors.items():
        if _ORIGINAL.search(key):
            continue  # the module as it was before training
        plain = bare_key(key)
        if _is_untrained(key, plain, config, file):
            continue
        owner, _, leaf = plain.rpartition(".")
        name = f"{classifier}.{leaf}" if owner == head else names.here(plain)
        if name in buffers:
            _check_buffer(key, tensor, buffers[name], file)
            same.add(name)
            continue
        if name not in parameters and not (owner == head and leaf in ("weight", "bias")):
            tuned[key] = tensor
            continue
        if owner != head and tensor.shape != tuple(parameters[name].shape):
            raise AdapterError(
                f"{file}: {key}: expected shape {list(parameters[name].shape)}, found "
                f"{list(tensor.shape)}."
            )
        # With bias="all" PEFT writes a saved module's bias under both of its names.
        if name in whole and not np.array_equal(whole[name], tensor):
            raise AdapterError(
                f"{file}: {key}: expected one tensor for {plain}, found two that differ. Leave out "
                "of the file the one that was not trained, the backbone's own."
            )
        check_float(key, tensor, file)
        whole[name], named[name] = tensor.astype(np.float64), plain
    _check_named(named, config, file)
    inside = [name for name in parameters if not _of(name, classifier)]
    own = (
        _alike(named, inside, config)
        if names.translated
        else [names.prefix + name for name in inside]
    )
    _check_saved(set(named.values()), config, own, file)
    _check_classifier(named, config, parameters, classifier, file)
    split = Split(tuned, whole)
    # Without classes the backbone's classifier is a placeholder that no training has seen.
    trained = [n for n in parameters if backbone.facts.classes or not _of(n, classifier)]
    _check_biases(split, named, names, config, trained, file)
    notes = (_UNSAVED,) if _moving(buffers) - same else ()
    return Split(tuned, _put_together(whole, thirds, backbone), notes)


def _moving(buffers: Collection[str]) -> set[str]:
    """Which buffers are statistics that move in training mode: a norm that is frozen for good (of
    timm, torchvision, transformers) has its weight among its buffers, too."""
    found = {name for name in buffers if name.endswith(_STATISTICS)}
    return {name for name in found if f"{name.removesuffix(_STATISTICS)}.weight" not in buffers}


def _check_buffer(key: str, tensor: NDArray[Any], own: torch.Tensor, file: Path) -> None:
    """What a saved module holds beside its parameters is the backbone's own."""
    if not np.array_equal(own.cpu().numpy(), tensor):
        raise AdapterError(
            f"{file}: {key}: expected the backbone's own values, found others: statistics of "
            "BatchNorm move in training mode, and no adapter holds them. Merge it where it was "
            "trained (merge_and_unload) and export the checkpoint as a model of its own, with "
            "`checkpoint`; or train it again with eval() called on those modules."
        )


def _is_untrained(key: str, plain: str, config: Mapping[str, Any], file: Path) -> bool:
    """Whether a tensor is of the copy of a module that PEFT puts beside the one that it trains.

    Args:
        key: of the file.
        plain: its `bare_key`.
        config: of PEFT.
        file: for messages.

    Raises:
        AdapterError: the file has the copy alone, as PEFT saves it.
    """
    nested = saved_in_saved(config, plain)
    if nested is None or key.startswith(f"{nested[0]}.modules_to_save."):
        return False
    if key == plain:
        outer, inner = nested
        raise AdapterError(
            f"{file}: {plain}: modules_to_save names both {outer} and {inner} in it, of which PEFT "
            "saves an untrained copy. If the model is still in memory, merge the adapter "
            "(merge_and_unload) and bring the checkpoint: `extract_adapter()`. Else train it "
            "again, with the whole path of one of them alone."
        )
    return True


# Part of a parameter by the name that it has alone -> the parameter, and which rows of it.
_Thirds = Mapping[str, tuple[str, slice]]


def _thirds(backbone: Backbone) -> _Thirds:
    """Weights and biases of q, k and v, which other implementations have apart; those of BEiT's
    biases are, under names of their own."""
    own = {name for name, _ in backbone.model.named_parameters()}
    found = {}
    for linear in backbone.facts.linears:
        weight, bias = path_of_parameters(backbone, linear)
        for i, site in enumerate(linear.sites if len(linear.sites) > 1 else ()):
            rows = slice(i * site.out, (i + 1) * site.out)
            attention, part = linear.path.rpartition(".")[0], site.name.rpartition(".")[2]
            for leaf, name, at in (
                ("weight", weight, rows),
                ("bias", bias, rows),
                ("bias", f"{attention}.{part}_bias", slice(None)),
            ):
                if name in own:
                    found[f"{site.name}.{leaf}"] = name, at
    return found


def _parameters(backbone: Backbone, thirds: _Thirds) -> dict[str, torch.Tensor]:
    """The backbone's parameters by the names that tensors of the file can have here."""
    own: dict[str, torch.Tensor] = dict(backbone.model.named_parameters())
    parts = {name: own[whole][rows] for name, (whole, rows) in thirds.items()}
    fused = {whole for whole, _ in thirds.values()}
    return {name: value for name, value in own.items() if name not in fused} | parts


def _put_together(
    whole: Mapping[str, NDArray[np.float64]], thirds: _Thirds, backbone: Backbone
) -> dict[str, NDArray[np.float64]]:
    """Parameters of the backbone: with the file's parts of them, else as they were."""
    result = {name: value for name, value in whole.items() if name not in thirds}
    for name, (parameter, rows) in thirds.items():
        if name in whole:
            if parameter not in result:
                own = backbone.model.get_parameter(parameter)
                result[parameter] = own.detach().double().cpu().numpy().copy()
            result[parameter][rows] = whole[name]
    return result


def _alike(
    named: Mapping[str, str], parameters: Collection[str], config: Mapping[str, Any]
) -> list[str]:
    """In another implementation's names: weights and biases that modules which were saved have, and
    those of the same modules of other blocks."""
    found = set()
    for name, plain in named.items():
        if not in_saved_module(config, plain):
            continue
        owner, theirs = name.rpartition(".")[0], plain.rpartition(".")[0]
        for other in parameters:
            path, _, leaf = other.rpartition(".")
            numbers = numbers_in(path)
            same = path and numbers_open(path) == numbers_open(owner)
            if same and leaf in ("weight", "bias") and len(numbers) == len(numbers_in(theirs)):
                found.add(f"{numbers_filled(numbers_open(theirs), numbers)}.{leaf}")
    return sorted(found)


def _check_named(named: Mapping[str, str], config: Mapping[str, Any], file: Path) -> None:
    """Every parameter in the file is one that the configuration names."""
    bias = config.get("bias", "none")
    for name, plain in named.items():
        trained = bias != "none" and (name.endswith(".bias") or (bias == "all" and _BIAS in plain))
        if not in_saved_module(config, plain) and not trained:
            raise AdapterError(
                f"{file}: {plain}: the file has it, but the configuration does not name it: "
                f"modules_to_save is {config.get('modules_to_save')}, bias "
                f"{config.get('bias', 'none')!r}. If it was trained, add its module to "
                "modules_to_save; else leave it out of the file."
            )


def _check_saved(
    found: Collection[str], config: Mapping[str, Any], own: Collection[str], file: Path
) -> None:
    """Every module that the configuration says was saved is in the file.

    Args:
        found: parameters in the file, as it calls them.
        config: of PEFT.
        own: parameters of the backbone, as the file would call them.
        file: for messages.
    """
    saved = config.get("modules_to_save") or []
    lacking = [
        name
        for name in saved
        if not any(in_saved_module({"modules_to_save": [name]}, key) for key in found)
    ]
    added = _ADDED.get(str(config.get("task_type")), set())
    if added.intersection(saved) - set(lacking):
        lacking = [name for name in lacking if name not in added]
    lacking += [name for name in own if in_saved_module(config, name) and name not in found]
    if lacking:
        raise AdapterError(
            f"{file}: modules_to_save is {saved}, but the file lacks {abbreviate(lacking, 4)}"
            ": without them the answers would be those of the "
            "backbone's own. PEFT's conversion of PiSSA and OLoRA leaves them out: copy these "
            "tensors from the adapter as it was saved, or take the module out of modules_to_save "
            "if it was not trained."
        )


def _check_classifier(
    named: Mapping[str, str],
    config: Mapping[str, Any],
    parameters: Collection[str],
    classifier: str,
    file: Path,
) -> None:
    """A classifier that was saved is there whole: half of it beside the backbone's is nobody's."""
    saved = [
        plain
        for name, plain in named.items()
        if _of(name, classifier) and in_saved_module(config, plain)
    ]
    lacking = [name for name in parameters if _of(name, classifier) and name not in named]
    if saved and lacking:
        raise AdapterError(
            f"{file}: the classifier has {', '.join(saved)} in the file and lacks "
            f"{', '.join(name.removeprefix(f'{classifier}.') for name in lacking)}. Save it whole; "
            "a bias that the training did not have is one of zeros."
        )


def _check_biases(
    split: Split,
    named: Mapping[str, str],
    names: Names,
    config: Mapping[str, Any],
    parameters: Collection[str],
    file: Path,
) -> None:
    """``all``: every bias of the backbone, also by `_BIAS` where the file has some that were not
    saved otherwise; ``lora_only`` and the like: of the adapted modules."""
    bias = config.get("bias", "none")
    if bias == "none":
        return
    trained = [name for name, plain in named.items() if not in_saved_module(config, plain)]
    before = bias == "all" and not all(name.endswith(".bias") for name in trained)
    owners = {names.owner(key) for key in split.tuned} - {None}
    adapted = {f"{names.here(str(owner))}.bias" for owner in owners}
    expected = [
        name
        for name in parameters
        if name in adapted
        or (bias == "all" and name.endswith(".bias"))
        or (before and _BIAS in name)
    ]
    missing = [name for name in expected if name not in split.whole]
    if missing:
        way = "Save the adapter whole."
        if bias != "all":
            way = (
                "PEFT from 0.7 to 0.20 saves none of adapted modules. Where the model is still in "
                "memory, merge the adapter (merge_and_unload) and bring the checkpoint: "
                "`extract_adapter()`. Else train it again."
            )
        raise AdapterError(
            f"{file}: bias is {bias!r}, but the file lacks {abbreviate(missing, 4)}. {way}"
        )


def _of(name: str, module: str) -> bool:
    return name.startswith(f"{module}.")
