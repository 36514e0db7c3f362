"""``.pth`` files: state dicts of torch.save with keys SITE.u, .v, .d, .lora_A, .lora_B.

Read with ``weights_only=True``: nothing is unpickled but tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import sites_there_are
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter
from hhdeploy.adapters.importers.authors import import_arc, import_rlrr, is_arc, is_rlrr
from hhdeploy.adapters.importers.keymap import mapped
from hhdeploy.adapters.importers.keys import bare_keys
from hhdeploy.adapters.importers.naming import names_of
from hhdeploy.adapters.importers.template import (
    ImportOptions,
    Tensors,
    finish,
    head_keys,
    largest_rank,
    low_rank_pair,
    split_thirds,
    stated_preprocess,
)
from hhdeploy.algebra import Reflection
from hhdeploy.backbones.sites import Form, LinearSpec, sites_of
from hhdeploy.backbones.weights import advice_on_parametrized, advice_on_peft
from hhdeploy.errors import AdapterError, abbreviate, require
from hhdeploy.files.checkpoints import unwrapped
from hhdeploy.files.weights import content_of

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone


# What a file is taken for that nobody says more of.
_FORM: Form = "additive"
_REFLECTION: Reflection = "unnormalized"
_SITE_TENSORS = ("u", "v", "d", "lora_A", "lora_B")

# LoRA's pair as modules have it; and what kohya's scripts and LyCORIS call it, and put before a
# module's path.
_AS_MODULE = re.compile(r"\.(lora_[AB])\.weight$")
_DOWN_UP = re.compile(r"(?P<owner>.+)\.(?:(?P<name>lora_down|lora_up)\.weight|alpha)")
_STARTS = ("", "lora_unet_", "lycoris_")

_ALPHA = (
    " Beside lora_A nobody knows what alpha means: give alpha / r, if it is that, as `lora_scale`, "
    "and drop the key with `key_map`."
)

# What to do with keys that are not known.
_OTHER_KEYS = (
    " A common start of your own is stripped with `prefix`; other names of such tensors are said "
    "with `key_map`. Whatever else was trained (biases, norms, another kind of adapter), merge "
    "into the weights there, and bring the whole checkpoint, by the model's names: "
    "`extract_adapter()`."
)


def import_pth(path: Path, backbone: Backbone, options: ImportOptions) -> Adapter:
    """The adapter of a state dict; see `hhdeploy.adapters.importers.import_adapter`."""
    tensors, notes = read_pth(path)
    read = bare_keys(tensors, options.prefix, path)
    if options.key_map is not None:
        read = mapped(read, options.key_map, path)
    read, scaled = _plain_lora(_own_head(read, backbone), path, backbone, options)
    if scaled and options.lora_scale != 1.0:
        raise AdapterError(
            f"{path}: `lora_scale`: expected none, found {options.lora_scale}: the file holds "
            "LoRA's alpha, and alpha / r is applied."
        )
    return _noted(_converted(read, path, backbone, options, scaled=scaled), notes)


def _noted(adapter: Adapter, notes: Sequence[str]) -> Adapter:
    """The adapter, which says which weights were taken of several beside what else was assumed."""
    if not notes:
        return adapter
    origin = adapter.config.extra["imported_from"]
    noted = {**origin, "assumed": [*notes, *origin.get("assumed", ())]}
    extra = {**adapter.config.extra, "imported_from": noted}
    return replace(adapter, config=replace(adapter.config, extra=extra))


def _own_head(read: Tensors, backbone: Backbone) -> Tensors:
    """The tensors, the classifier's by the model's name for it also where a file has it behind an
    outer module's name, as all it holds (Lightning's ``model.``), or calls it as transformers does.
    """
    own = backbone.facts.classifier
    result: Tensors = {}
    for key, tensor in read.items():
        owner, _, leaf = key.rpartition(".")
        name = next((name for name in (own, "classifier") if f".{owner}".endswith(f".{name}")), "")
        start = owner.removesuffix(name)
        head = own and name and leaf in ("weight", "bias")
        found = head and all(k.startswith(start) for k in read)
        result[f"{own}.{leaf}" if found else key] = tensor
    return result if len(result) == len(read) else read  # two classifiers: refused by their names


def _plain_lora(
    read: Tensors, path: Path, backbone: Backbone, options: ImportOptions
) -> tuple[Tensors, bool]:
    """LoRA's pairs by SITE.lora_A and .lora_B where they are modules (``lora_A.weight``) or called
    as kohya's scripts and LyCORIS do (``lora_down.weight``, ``alpha``); other keys as they are.

    Of the latter two alpha / r is what is meant, and lora_B is multiplied by it; they write
    modules' paths with ``_`` for dots.

    Returns:
        The tensors, and whether they are multiplied.

    Raises:
        AdapterError: half of a pair, no number for alpha, or some modules without theirs.
    """
    if advice_on_peft([options.prefix + key for key in read]):
        return read, False
    groups: dict[str, Tensors] = {}
    for key, tensor in read.items():
        if (found := _DOWN_UP.fullmatch(key)) is not None:
            groups.setdefault(found["owner"], {})[found["name"] or "alpha"] = tensor
    if not any("lora_down" in group or "lora_up" in group for group in groups.values()):
        renamed = {_AS_MODULE.sub(r".\1", key): tensor for key, tensor in read.items()}
        return (renamed if len(renamed) == len(read) else read), False
    result = {key: tensor for key, tensor in read.items() if not _DOWN_UP.fullmatch(key)}
    flat = {
        start + name.replace(".", "_"): name
        for linear in backbone.facts.linears
        for name in (linear.path, *(site.name for site in linear.sites))
        for start in _STARTS
    }
    with_alpha = [owner for owner, group in groups.items() if "alpha" in group]
    for owner, group in groups.items():
        expected = {"lora_down", "lora_up", *(("alpha",) if with_alpha else ())}
        if set(group) != expected:
            raise AdapterError(
                f"{path}: {owner}: expected {', '.join(sorted(expected))}, as other modules of the "
                f"file have, found {', '.join(sorted(group))}."
            )
        down, up = group["lora_down"], group["lora_up"].astype(np.float64)
        if with_alpha:
            alpha = group["alpha"]
            if alpha.size != 1 or not np.isfinite(alpha).all() or not alpha.any() or not len(down):
                raise AdapterError(
                    f"{path}: {owner}.alpha: expected one number that is not 0, found "
                    f"{alpha.tolist()}."
                )
            up = up * (float(alpha.reshape(())) / len(down))
        site = flat.get(owner, owner)
        result |= {f"{site}.lora_A": down, f"{site}.lora_B": up}
    return result, bool(with_alpha)


def _converted(
    read: Tensors, path: Path, backbone: Backbone, options: ImportOptions, *, scaled: bool
) -> Adapter:
    """The adapter of a file's tensors: of the authors' own kinds, or by sites. ``scaled``: the
    file said LoRA's alpha / r."""
    for belongs, import_file in ((is_rlrr, import_rlrr), (is_arc, import_arc)):
        if belongs(read):
            return import_file(read, path, backbone, options)
    tensors = _site_tensors(read, path, backbone, options)
    inside = [name for name in tensors if name not in head_keys(backbone)]
    names = names_of(inside, backbone, path) if inside else None
    linears = {linear.path: linear for linear in backbone.facts.linears}
    fused: dict[str, Tensors] = {}
    result: Tensors = {}
    for key, tensor in tensors.items():
        name = key if names is None or key in head_keys(backbone) else names.here(key)
        owner, _, last = name.rpartition(".")
        if last in _SITE_TENSORS and owner in linears and len(linears[owner].sites) > 1:
            fused.setdefault(owner, {})[last] = tensor
        else:
            result[name] = tensor
    for owner, group in fused.items():
        result |= _thirds(linears[owner], *low_rank_pair(group, owner, path), path)
    _check_sites(result, backbone, path)
    config = AdapterConfig(
        backbone.facts.model,
        form=options.form or _FORM,
        reflection=options.reflection or _REFLECTION,
        r=largest_rank(result),
        extra={"imported_from": {"format": "torch.save", **_said(tensors, options, scaled)}},
    )
    stated = stated_preprocess(path.parent, backbone, options)
    return finish(result, config, path, backbone, options, stated)


def _thirds(linear: LinearSpec, a: NDArray[Any], b: NDArray[Any], file: Path) -> Tensors:
    """`split_thirds`, and of loralib's MergedLinear: q, k and v have rows of lora_A of their own.

    Raises:
        AdapterError: the shapes are neither's, or a MergedLinear's that has some of the three.
    """
    rank = b.shape[1] if b.ndim == 2 else 0
    count = a.shape[0] // rank if rank and a.shape == (a.shape[0] // rank * rank, linear.in_) else 0
    if count == 0 or len(b) != count * (linear.out // 3):
        return split_thirds(linear, a, b, file)
    if count < 3:
        raise AdapterError(
            f"{file}: {linear.path}: lora_A {list(a.shape)} and lora_B {list(b.shape)} are those "
            f"of loralib's MergedLinear with {count} of q, k and v, and the file does not say "
            f"which (enable_lora). Save them apart: part i of lora_A.chunk({count}) as "
            f"{linear.sites[0].name}.lora_A, or .k or .v, and of lora_B likewise."
        )
    parts = zip(linear.sites, np.split(a, 3), np.split(b, 3), strict=True)
    return {
        f"{site.name}.{name}": rows
        for site, *pair in parts
        for name, rows in zip(("lora_A", "lora_B"), pair, strict=True)
    }


def _said(tensors: Tensors, options: ImportOptions, scaled: bool) -> dict[str, Any]:
    """What LoRA's products were multiplied by, and what the file does not say: that, but of HTA's,
    which are whole beside u and v; and what u and v mean."""
    bare = [
        n for n in tensors if n.endswith(".lora_B") and f"{n[: -len('lora_B')]}u" not in tensors
    ]
    assumed = []
    if bare and options.lora_scale == 1.0 and not scaled:
        assumed.append(
            f"{abbreviate(bare, 1)} is taken as it is: the file does not hold LoRA's alpha / r. "
            "Where that is not 1, give it as the lora scale"
        )
    reflected = [n for n in tensors if n.endswith(".u")]
    taken = [f"the reflection {_REFLECTION}"] if options.reflection is None else []
    taken += [f"the form {_FORM}"] if options.form is None else []
    if reflected and taken:
        assumed.append(
            f"{abbreviate(reflected, 1)} and what belongs to it are taken in {' and '.join(taken)}"
            ": the file does not say. Where it was trained otherwise, give these; where it acts on "
            "rows, as the paper writes it, a key map"
        )
    scale = {} if scaled else {"lora_scale": options.lora_scale}
    return {**scale, **({"assumed": assumed} if assumed else {})}


def _site_tensors(read: Tensors, path: Path, backbone: Backbone, options: ImportOptions) -> Tensors:
    """The tensors of an adapter's file, lora_B scaled."""
    found: Tensors = {}
    for key, tensor in read.items():
        last = key.rpartition(".")[2]
        if key not in head_keys(backbone) and last not in _SITE_TENSORS:
            raise AdapterError(
                f"{path}: unknown tensor key {key!r}. Expected <site>.u, .v, .d, .lora_A or "
                f".lora_B, and the classifier's ({', '.join(head_keys(backbone))})."
                + (_ALPHA if f"{key.removesuffix('.alpha')}.lora_A" in read else "")
                + _advice([options.prefix + key for key in read])
            )
        scaled = last == "lora_B" and options.lora_scale != 1.0
        found[key] = tensor.astype(np.float64) * options.lora_scale if scaled else tensor
    return found


def _advice(keys: Sequence[str]) -> str:
    return advice_on_peft(keys) or advice_on_parametrized(keys) or _OTHER_KEYS


def _check_sites(tensors: Tensors, backbone: Backbone, path: Path) -> None:
    """Every tensor is of a site, or of the classifier."""
    known = sites_of(backbone.facts.linears)
    for key in tensors:
        if key not in head_keys(backbone) and key.rpartition(".")[0] not in known:
            raise AdapterError(
                f"{path}: {key}: {backbone.facts.model} has no such site, or its forward pass does "
                f"not use it. {sites_there_are(backbone.facts)}{_advice(list(tensors))}"
            )


def read_pth(path: Path) -> tuple[Tensors, tuple[str, ...]]:
    """The tensors of a file of ``torch.save`` or of safetensors, as float32 (integers as they are).

    Of a training's checkpoint the averaged weights (EMA) where there are some, as timm reads it;
    and a line where it has others beside those that were taken.
    """
    torch = require("torch", "export", f"reading {path.name}")
    try:
        content, notes = unwrapped(content_of(path))
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"{path} cannot be read: {reason}. Expected a safetensors file, or a state dict of "
            "tensors written by torch.save; other pickled objects are never loaded."
        ) from error
    if not isinstance(content, Mapping):
        raise AdapterError(f"{path}: expected a state dict, found {type(content).__name__}.")
    tensors: Tensors = {}
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise AdapterError(f"{path}: {key}: expected a tensor, found {type(value).__name__}.")
        plain = value.detach().cpu()  # a Parameter, or a tensor that a GPU saved
        tensors[str(key)] = (plain.float() if plain.is_floating_point() else plain).numpy()
    return tensors, notes
