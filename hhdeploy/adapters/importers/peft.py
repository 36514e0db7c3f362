"""A directory of PEFT: adapter_config.json and adapter_model.safetensors (or several; or a .bin).

LoRA, rsLoRA and HRA are read as they are; every other method, and every variant that is not known
for certain, is loaded and merged by PEFT itself. Configuration and tensors are compared both ways.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hhdeploy.adapters.calls import check_called
from hhdeploy.adapters.checks import no_place
from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE, AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.importers.difference import changed_parameters
from hhdeploy.adapters.importers.keys import (
    PEFT_MODEL,
    PEFT_ROOT,
    bare_keys,
    of_one_adapter,
    owner_of,
)
from hhdeploy.adapters.importers.lora import (
    HRA,
    LORA,
    changes_weight,
    low_rank_of,
    tuned_groups,
    tuned_tensor,
    unknown_option,
)
from hhdeploy.adapters.importers.merging import merged_parameters, said_of_reading
from hhdeploy.adapters.importers.naming import Names, names_of
from hhdeploy.adapters.importers.pth import read_pth
from hhdeploy.adapters.importers.saved import Split, bare_key, head_of_file, split_saved
from hhdeploy.adapters.importers.targets import compare_targets, fits, pattern_value
from hhdeploy.adapters.importers.template import (
    ImportOptions,
    Tensors,
    finish,
    linear_at,
    split_thirds,
    stated_preprocess,
)
from hhdeploy.adapters.origin import check_reading, other_name
from hhdeploy.adapters.peft_config import check_values, read_peft_config
from hhdeploy.algebra import Array
from hhdeploy.backbones.licences import licences_of, licences_of_card, together
from hhdeploy.backbones.sites import LinearSpec
from hhdeploy.backbones.structure import parameters_of
from hhdeploy.errors import AdapterError, abbreviate
from hhdeploy.files.tensors import read_tensors
from hhdeploy.files.weights import files_of

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone

_OLD_TENSOR_FILE = "adapter_model.bin"
# What lists the files of an adapter that is in several: as transformers calls it, and as its name.
_INDEXES = ("model.safetensors.index.json", f"{TENSOR_FILE}.index.json")
_STEM = TENSOR_FILE.partition(".")[0]
_HTA, _ADALORA = "HTA", "ADALORA"
# BONE of PEFT 0.14 to 0.17 computes what MiSS does, which took its place, under another name.
_BONE, _MISS = "BONE", "MISS"
_BONE_TENSOR = re.compile(r"\.bone_block(?=\.|$)")

_FACTS = (
    *("peft_type", "peft_version", "base_model_name_or_path", "r", "lora_alpha", "use_rslora"),
    *("use_dora", "rank_pattern", "alpha_pattern", "apply_GS", "bias", "modules_to_save"),
)


def peft_needs_weights(path: Path) -> bool:
    """True if converting the directory takes the backbone's weights, not only its structure."""
    config = read_peft_config(path)
    plain = config.get("peft_type") == LORA and unknown_option(config) is None
    return not plain or config.get("bias", "none") != "none"


def import_peft(path: Path, backbone: Backbone, options: ImportOptions) -> Adapter:
    """The adapter of a PEFT directory; see `hhdeploy.adapters.importers.import_adapter`."""
    if options.form or options.reflection or options.lora_scale != 1.0 or options.key_map:
        raise AdapterError(
            f"{path}: `form`, `reflection`, `lora_scale` and `key_map` are for .pth files; "
            f"{CONFIG_FILE} says all that an adapter of PEFT needs."
        )
    written = read_peft_config(path)
    where = path / CONFIG_FILE
    if written.get("peft_type") == _HTA:
        raise AdapterError(f"{where}: peft_type is HTA: this adapter needs no import.")
    bone = written.get("peft_type") == _BONE
    config = {**written, "peft_type": _MISS} if bone else written
    check_values(config, where)
    file, tensors, outside, notes = _read(path, options, bone=bone)
    own = {key: tensor for key, tensor in tensors.items() if key not in outside}
    head = head_of_file(own, config, backbone) or head_of_file(tensors, config, backbone)
    left = [key for key in outside if _of_another(key, head, backbone)]
    tensors = {key: tensor for key, tensor in tensors.items() if key not in left}
    if head is not None and not backbone.facts.classifier:
        raise AdapterError(f"{file}: {no_place(head, backbone.facts)}")
    inside = [
        key
        for key in map(bare_key, tensors)
        if not key.startswith(PEFT_ROOT) and key.rpartition(".")[0] != head
    ]
    names = names_of(inside, backbone, file, options.prefix)
    split = split_saved(tensors, head, names, config, backbone, file)
    assumed = [*notes, *split.notes, *said_of_reading(config), *other_name(config, backbone.facts)]
    if left:
        assumed.append(f"left out, as they are not in {options.prefix}: {abbreviate(left, 3)}")
    adapted = {names.here(names.owner(key) or "") for key in split.tuned}
    if head is not None or backbone.facts.classifier in adapted:
        assumed += check_reading(config, backbone, file, translated=bool(names.translated))
    if unknown_option(config) is None and not _adapts_attention(split.tuned, names, backbone):
        result = _read_as_it_is(config, split, names, backbone, options, file)
    else:
        result = _merged_by_peft(config, split, names, backbone, options, where)
    rank = config.get("r")
    described = AdapterConfig(
        backbone.facts.model,
        r=rank if isinstance(rank, int) else 1,
        license=together(licences_of(config.get("license")), licences_of_card(path)),
        extra={"imported_from": _facts_of(written, assumed)},
    )
    stated = stated_preprocess(path, backbone, options)
    return finish(result, described, file, backbone, options, stated)


def _adapts_attention(tuned: Tensors, names: Names, backbone: Backbone) -> bool:
    """Whether a target is a whole nn.MultiheadAttention: PEFT adapts its packed weight, and the
    Linear behind it as a part of the same target."""
    from torch import nn

    owners = {module.module for key in tuned if (module := tuned_tensor(key)) is not None}
    found = (names.here(owner) for owner in owners)
    modules = dict(backbone.model.named_modules())
    return any(isinstance(modules.get(path), nn.MultiheadAttention) for path in found)


def _read(
    path: Path, options: ImportOptions, *, bone: bool
) -> tuple[Path, Tensors, frozenset[str], tuple[str, ...]]:
    """The tensors of one adapter by `bare` key without PEFT's start: the options' prefix stays
    where it comes behind that, as the configuration's names have it. And the keys of those that
    lack the prefix where others inside have it, and what `read_pth` notes."""
    prefix = options.prefix
    notes: tuple[str, ...] = ()
    # An index last: it may be that of the backbone, saved beside.
    known = [path / name for name in (TENSOR_FILE, _OLD_TENSOR_FILE, *_INDEXES)]
    file = next((each for each in known if each.is_file()), known[0])
    if file.name == _OLD_TENSOR_FILE:
        tensors, notes = read_pth(file)
    elif file.name in _INDEXES:
        tensors = _divided(file)
    else:
        tensors, _ = read_tensors(file, AdapterError)
    if bone:
        tensors = {_BONE_TENSOR.sub(".miss_block", key): t for key, t in tensors.items()}
    found: Tensors = {}
    outside, names = set(), set()
    own = of_one_adapter(bare_keys(tensors, prefix, file), options.adapter_name, file)
    for key, tensor in own.items():
        # A model that was wrapped twice has PEFT's start twice.
        if not key.startswith(PEFT_ROOT) or key.startswith(PEFT_MODEL * 2):
            start = key[: max(key.rfind(PEFT_MODEL), 0)]
            way = f"Cut what is before it with `prefix={start!r}`." if start else ""
            raise AdapterError(
                f"{file}: {key}: expected keys that start with {PEFT_MODEL} (once). "
                f"{way or 'Save the adapter with save_pretrained of PEFT, which writes it.'}"
            )
        inside = key.removeprefix(PEFT_MODEL)
        name = inside.removeprefix(prefix)
        if name in names:
            raise AdapterError(
                f"{file}: {key}: expected one tensor for {name}, found two, with and without the "
                f"prefix {prefix}. Leave the other module's out of the file."
            )
        names.add(name)
        found[inside] = tensor
        outside |= {inside} if name == inside and prefix else set()
    if not found:
        raise AdapterError(f"{file}: expected the adapter's tensors, found none.")
    before = prefix != "" and any(key.startswith(prefix) for key in tensors)
    all_alike = before or len(outside) == len(found)
    return file, found, frozenset() if all_alike else frozenset(outside), notes


def _divided(index: Path) -> Tensors:
    """The tensors of an adapter in several files, which an index lists."""
    try:
        files = files_of(index)
    except ValueError as error:
        raise AdapterError(f"{index}: {error}.") from error
    if other := next((f for f in files if not f.name.startswith(_STEM)), None):
        raise AdapterError(
            f"{index}: expected a list of an adapter's files, {_STEM}….safetensors, found "
            f"{other.name}. Expected {TENSOR_FILE} beside {CONFIG_FILE}."
        )
    found: Tensors = {}
    for file in files:
        tensors, _ = read_tensors(file, AdapterError)
        if twice := sorted(tensors.keys() & found.keys()):
            raise AdapterError(f"{file}: {twice[0]}: another file of {index.name} has it, too.")
        found |= tensors
    return found


def _of_another(key: str, head: str | None, backbone: Backbone) -> bool:
    """Whether a tensor outside of the part that ``prefix`` names is of another part of the model:
    neither the classifier's nor of a module by the backbone's own names."""
    plain = bare_key(key)
    parameters = (name for name, _ in backbone.model.named_parameters())
    modules = frozenset(name.rpartition(".")[0] for name in parameters)
    return plain.rpartition(".")[0] != head and owner_of(plain, modules) is None


def _facts_of(config: Mapping[str, Any], assumed: list[str]) -> dict[str, Any]:
    """What the imported adapter remembers of its PEFT configuration, and what it does not say."""
    kept = {key: config[key] for key in _FACTS if config.get(key) not in (None, False, "none")}
    return {"format": "peft", **kept, **({"assumed": assumed} if assumed else {})}


def _read_as_it_is(
    config: Mapping[str, Any],
    split: Split,
    names: Names,
    backbone: Backbone,
    options: ImportOptions,
    file: Path,
) -> Tensors:
    """LoRA and HRA: products of low rank; on a convolution or the classifier, new values."""
    groups = tuned_groups(split.tuned, file)
    compare_targets(config, groups, names, backbone, file)
    result: Tensors = {}
    whole = dict(split.whole)
    called: list[str] = []
    for module, group in groups.items():
        here = names.here(module)
        linear = linear_at(backbone.facts, here)
        if linear is None and here not in names.modules:
            raise AdapterError(f"{file}: {module}: {backbone.facts.model} has no such module.")
        if here == backbone.facts.classifier and backbone.facts.classes == 0:
            raise AdapterError(f"{file}: {no_place(module, backbone.facts)}")
        weight, trained = None, whole.get(f"{here}.weight")
        if linear is None or config["peft_type"] == HRA:
            _need_weights(config, here, options, file)
            weight = _weight(backbone, here, linear) if trained is None else _matrix(trained)
        a, b = low_rank_of(config, module, group, weight, file)
        # In another implementation's names they are modules of that one, which calls its own.
        if not names.translated and here in names.modules and changes_weight(a, b):
            called.append(here)
        if linear is not None and trained is None:
            result |= split_thirds(linear, a, b, file)
        else:
            whole[f"{here}.weight"] = _added(backbone, here, b @ a, file, trained)
    if called:
        check_called(backbone, called, file)
    if any(not name.startswith(f"{backbone.facts.classifier}.") for name in whole):
        _need_weights(config, next(iter(whole)), options, file)
    return result | changed_parameters(backbone, whole, {}, file)


def _need_weights(
    config: Mapping[str, Any], module: str, options: ImportOptions, file: Path
) -> None:
    if not options.weights_known:
        kind = config["peft_type"]
        why = "multiplies the backbone's weights" if kind == HRA else f"changes {module} itself"
        raise AdapterError(
            f"{file}: this {kind} adapter {why} and cannot be converted without the backbone's "
            "weights. Pass them with `checkpoint`."
        )


def _weight(backbone: Backbone, path: str, linear: LinearSpec | None) -> Array:
    """The weight of a module as (out, in kh kw); of one third of a fused qkv its rows."""
    if linear is None:
        whole = backbone.model.get_submodule(path).get_parameter("weight")
        return whole.detach().double().cpu().numpy().reshape(whole.shape[0], -1)
    module, name, _ = parameters_of(backbone.model, linear.path)
    value: Array = module.get_parameter(name).detach().double().cpu().numpy()
    fused = next(spec for spec in backbone.facts.linears if spec.path == linear.path)
    start = fused.sites.index(linear.sites[0]) * linear.sites[0].out
    return value[start : start + linear.out]


def _matrix(weight: Array) -> Array:
    return weight.astype(np.float64).reshape(len(weight), -1)


def _added(backbone: Backbone, path: str, delta: Array, file: Path, trained: Array | None) -> Array:
    """The weight at a path and a product; it is that of the file where this has one."""
    weight = backbone.model.get_submodule(path).get_parameter("weight")
    if delta.size != weight.numel() or len(delta) != len(weight):
        raise AdapterError(
            f"{file}: {path}: expected a product for a weight of shape {list(weight.shape)}, "
            f"found {list(delta.shape)}."
        )
    own = weight.detach().double().cpu().numpy() if trained is None else trained
    value: Array = own.astype(np.float64) + delta.reshape(tuple(weight.shape))
    return value


def _merged_by_peft(
    config: Mapping[str, Any],
    split: Split,
    names: Names,
    backbone: Backbone,
    options: ImportOptions,
    where: Path,
) -> Tensors:
    """Any other method: what PEFT makes of the parameters."""
    _need_weights(config, "the weights", options, where)
    described, tensors = dict(config), split.tuned
    if names.translated:
        described, tensors = _in_names_of(backbone, config, split.tuned, names, where)
    else:
        tensors = {
            k if k.startswith(PEFT_ROOT) else names.prefix + names.here(k): t
            for k, t in tensors.items()
        }
    keys = {k if k.startswith(PEFT_ROOT) else PEFT_MODEL + k: t for k, t in tensors.items()}
    after = merged_parameters(backbone, described, keys, split.whole, names.prefix, where)
    hints: dict[str, list[Array]] = {}
    for key, tensor in tensors.items():
        owner = names.owner(key)
        if owner is not None and tensor.ndim == 2:
            hints.setdefault(names.here(owner), []).append(tensor.astype(np.float64))
    return changed_parameters(backbone, after, hints, where)


def _patterns_here(
    config: Mapping[str, Any], owners: Collection[str], names: Names
) -> dict[str, dict[str, Any]]:
    """What a configuration says of single modules (``rank_pattern`` and the like), by each one's
    whole path here; AdaLoRA says it of its tensors."""
    found = {k: v for k, v in config.items() if k.endswith("_pattern") and isinstance(v, Mapping)}
    if config["peft_type"] == _ADALORA:
        return {k: {names.here(path): kept for path, kept in v.items()} for k, v in found.items()}
    said = {key: {o: pattern_value(v, o, None) for o in owners} for key, v in found.items()}
    return {
        key: {names.here(owner): value for owner, value in values.items() if value is not None}
        for key, values in said.items()
    }


def _in_names_of(
    backbone: Backbone, config: Mapping[str, Any], tuned: Tensors, names: Names, where: Path
) -> tuple[dict[str, Any], Tensors]:
    """Configuration and tensors in the backbone's own names, where every module is one of it."""
    modules = dict(backbone.model.named_modules())
    owners = {owner for key in tuned if (owner := names.owner(key)) is not None}
    compare_targets(config, owners, names, backbone, where)
    targets = sorted(set(map(names.here, owners)))
    if any(path not in modules for path in targets):
        raise AdapterError(
            f"{where}: the names are not those of {backbone.facts.model}, and "
            f"{config['peft_type']} adapters with q, k and v apart are converted on the model that "
            "they were trained on alone: give that `model`."
        )
    renamed = {names.here(key): tensor for key, tensor in tuned.items()}
    # The keys stay: which are there says how old the adapter is.
    emptied = ("layers_to_transform", "layers_pattern", "exclude_modules")
    kept = {key: None if key in emptied else value for key, value in config.items()}
    kept |= _patterns_here(config, owners, names)
    if forward := config.get("feedforward_modules"):  # of IA3: what is scaled before, not behind
        kept["feedforward_modules"] = [names.here(o) for o in sorted(owners) if fits(forward, o)]
    return {**kept, "target_modules": targets}, renamed
