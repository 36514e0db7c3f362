"""Adapters of other tools as hhdeploy adapters: PEFT's LoRA, rsLoRA and HRA, and .pth files.

PEFT itself is not needed; torch is, for .pth and .bin files (``weights_only=True``: nothing is
unpickled but tensors). Whatever this module does not know for certain is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapter import CONFIG_FILE, TENSOR_FILE, Adapter, AdapterConfig, assemble_adapter
from hhdeploy.algebra import Reflection
from hhdeploy.errors import AdapterError, require
from hhdeploy.files.tensors import read_tensors
from hhdeploy.files.writing import sha256_of
from hhdeploy.importing_peft import (
    HRA,
    LORA,
    check_config,
    facts_of,
    group_tensors,
    hra_low_rank,
    lora_scale,
    low_rank_pair,
    read_peft_config,
)
from hhdeploy.plan import check_adapter
from hhdeploy.preprocess import Preprocess
from hhdeploy.sites import KINDS, Form, LinearSpec, select_sites, sites_of

if TYPE_CHECKING:
    from hhdeploy.backbone import Backbone

Tensors = dict[str, NDArray[Any]]

_SITE_TENSORS = ("u", "v", "d", "lora_A", "lora_B")
_OLD_TENSOR_FILE = "adapter_model.bin"


@dataclass(frozen=True)
class ImportOptions:
    """What the source does not say.

    Attributes:
        form: of a .pth file; None: additive. PEFT's methods are additive.
        reflection: of a .pth file; None: unnormalized.
        prefix: stripped from every tensor key (after PEFT's own ``base_model.model.``).
        lora_scale: of a .pth file: factor of lora_B lora_A, for files that keep alpha / r apart.
        class_names: one per class, or None.
        preprocess: how images become inputs; None: the backbone's.
        weights_known: False: the backbone's weights are placeholders, so ``base_sha256`` stays
            null and methods that need the weights (HRA) are refused.
    """

    form: Form | None = None
    reflection: Reflection | None = None
    prefix: str = ""
    lora_scale: float = 1.0
    class_names: tuple[str, ...] | None = None
    preprocess: Preprocess | None = None
    weights_known: bool = True


_DEFAULTS = ImportOptions()


def import_adapter(
    source: str | Path, backbone: Backbone, options: ImportOptions = _DEFAULTS
) -> Adapter:
    """Convert an adapter of another tool; its facts are kept under ``imported_from``.

    Args:
        source: a PEFT directory (``adapter_config.json`` with peft_type LORA or HRA), or a
            ``.pth`` file with keys ``<site>.<u|v|d|lora_A|lora_B>`` and the classifier's, at the
            top or under ``state_dict`` or ``model``.
        backbone: the model that the adapter belongs to. HRA multiplies the weights, so it is
            converted with these very weights.
        options: see `ImportOptions`.

    Returns:
        An adapter of float32 tensors. LoRA and HRA become pure low-rank sites, additive and
        without a scale; a fused qkv is split into its q, k and v thirds.

    Raises:
        AdapterError: naming file and key, for everything that is not known for certain: other
            methods and variants, unknown keys, layers that are no sites, wrong shapes.
    """
    path = Path(source)
    if path.is_dir():
        return _import_peft(path, backbone, options)
    if not path.is_file():
        raise AdapterError(f"{path} does not exist. Expected a PEFT directory or a .pth file.")
    return _import_pth(path, backbone, options)


def needs_weights(source: str | Path) -> bool:
    """True if converting ``source`` takes the backbone's weights, not only its structure."""
    path = Path(source)
    return path.is_dir() and read_peft_config(path).get("peft_type") == HRA


def _import_peft(path: Path, backbone: Backbone, options: ImportOptions) -> Adapter:
    if options.form is not None or options.reflection is not None or options.lora_scale != 1.0:
        raise AdapterError(
            f"{path}: form, reflection and lora scale are for .pth files; {CONFIG_FILE} says all "
            "that an adapter of PEFT needs."
        )
    config = read_peft_config(path)
    where = path / CONFIG_FILE
    check_config(config, where)
    kind = config["peft_type"]
    if kind == HRA and not options.weights_known:
        raise AdapterError(
            f"{where}: HRA multiplies the backbone's weights and cannot be converted without "
            "them. Pass them with --checkpoint FILE."
        )
    file = path / TENSOR_FILE
    if file.is_file() or not (path / _OLD_TENSOR_FILE).is_file():
        tensors, _ = read_tensors(file, AdapterError)
    else:
        file = path / _OLD_TENSOR_FILE
        tensors = _read_pth(file)
    groups, head = group_tensors(tensors, file, _head_keys(backbone), options.prefix)
    linears = {linear.path: linear for linear in backbone.facts.linears}
    result: Tensors = dict(head)
    for name, group in groups.items():
        linear = _linear(linears, name, file, backbone)
        if kind == LORA:
            a, b = low_rank_pair(group, name, file)
            # A wrong shape is no rank: it is refused just below.
            scale = lora_scale(config, name, a.shape[0], where) if a.ndim == 2 else 1.0
            b = b.astype(np.float64) * scale
        else:
            a, b = _hra_pair(group, linear, file, backbone, bool(config.get("apply_GS")))
        result |= _split(linear, a, b, file)
    rank = config.get("r")
    described = AdapterConfig(
        backbone.facts.model,
        r=rank if isinstance(rank, int) else 1,
        extra={"imported_from": facts_of(config)},
    )
    return _finish(result, described, file, backbone, options)


def _hra_pair(
    group: Tensors, linear: LinearSpec, file: Path, backbone: Backbone, gram_schmidt: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """lora_A, lora_B with W R = W + lora_B lora_A; the thirds of a fused qkv share R."""
    u = group.get("hra_u")
    if u is None or len(group) != 1 or u.ndim != 2 or u.shape[0] != linear.in_:
        found = ", ".join(f"{name} {list(t.shape)}" for name, t in sorted(group.items()))
        raise AdapterError(
            f"{file}: {linear.path}: expected hra_u of shape [{linear.in_}, r], found {found}."
        )
    try:
        a, c = hra_low_rank(u.astype(np.float64), gram_schmidt=gram_schmidt)
    except ValueError as error:
        raise AdapterError(f"{file}: {linear.path}.hra_u: {error}") from error
    parameter = backbone.model.get_submodule(linear.path).get_parameter("weight")
    weight: NDArray[np.float64] = parameter.detach().double().cpu().numpy()
    return a, weight @ c


def _import_pth(path: Path, backbone: Backbone, options: ImportOptions) -> Adapter:
    linears = {linear.path: linear for linear in backbone.facts.linears}
    fused: dict[str, Tensors] = {}
    result: Tensors = {}
    for key, tensor in _read_pth(path).items():
        if not key.startswith(options.prefix):
            raise AdapterError(f"{path}: {key}: expected keys that start with {options.prefix!r}.")
        name = key.removeprefix(options.prefix)
        owner, _, last = name.rpartition(".")
        if name not in _head_keys(backbone) and last not in _SITE_TENSORS:
            raise AdapterError(
                f"{path}: unknown tensor key {key!r}. Expected <site>.u, .v, .d, .lora_A or "
                f".lora_B, and the classifier's ({', '.join(_head_keys(backbone))}). Save the "
                "trained tensors alone, without the backbone's; a common start is --prefix."
            )
        if last == "lora_B":
            tensor = tensor.astype(np.float64) * options.lora_scale
        if last in _SITE_TENSORS and owner in linears and len(linears[owner].sites) > 1:
            fused.setdefault(owner, {})[last] = tensor
        else:
            result[name] = tensor
    for owner, group in fused.items():
        result |= _split(linears[owner], *low_rank_pair(group, owner, path), path)
    config = AdapterConfig(
        backbone.facts.model,
        form=options.form or "additive",
        reflection=options.reflection or "unnormalized",
        r=max((t.shape[0] for n, t in result.items() if n.endswith(".lora_A")), default=0),
        extra={"imported_from": {"format": "torch.save", "lora_scale": options.lora_scale}},
    )
    return _finish(result, config, path, backbone, options)


def _read_pth(path: Path) -> Tensors:
    """The tensors of a file of ``torch.save``, as float32 (integers as they are)."""
    torch = require("torch", "export", f"reading {path.name}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise AdapterError(
            f"{path} cannot be read: {reason} Expected a state dict of tensors written by "
            "torch.save; other pickled objects are never loaded."
        ) from error
    for entry in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(entry), Mapping):
            content = content[entry]
    if not isinstance(content, Mapping):
        raise AdapterError(f"{path}: expected a state dict, found {type(content).__name__}.")
    tensors: Tensors = {}
    for key, value in content.items():
        if not isinstance(value, torch.Tensor):
            raise AdapterError(f"{path}: {key}: expected a tensor, found {type(value).__name__}.")
        tensors[str(key)] = (value.float() if value.is_floating_point() else value).numpy()
    return tensors


def _head_keys(backbone: Backbone) -> tuple[str, str]:
    return f"{backbone.facts.classifier}.weight", f"{backbone.facts.classifier}.bias"


def _linear(
    linears: Mapping[str, LinearSpec], name: str, file: Path, backbone: Backbone
) -> LinearSpec:
    if name not in linears:
        raise AdapterError(
            f"{file}: {name}: {backbone.facts.model} has no such site. Expected "
            f"{', '.join(list(linears)[:4])}, …; convolutions (patch_embed), the classifier and "
            "other layers cannot be adapted."
        )
    return linears[name]


def _split(linear: LinearSpec, a: NDArray[Any], b: NDArray[Any], file: Path) -> Tensors:
    """lora_A (r, in) and lora_B (out, r) of a whole Linear as tensors of its sites."""
    r = a.shape[0] if a.ndim == 2 else 0
    if a.shape != (r, linear.in_) or b.shape != (linear.out, r):
        raise AdapterError(
            f"{file}: {linear.path}: expected lora_A [r, {linear.in_}] and lora_B "
            f"[{linear.out}, r], found {list(a.shape)} and {list(b.shape)}."
        )
    tensors: Tensors = {}
    for site, rows in zip(linear.sites, np.split(b, len(linear.sites)), strict=True):
        tensors |= {f"{site.name}.lora_A": a, f"{site.name}.lora_B": rows}
    return tensors


def _finish(
    tensors: Tensors, config: AdapterConfig, file: Path, backbone: Backbone, options: ImportOptions
) -> Adapter:
    """Complete the configuration, then check the adapter as any other."""
    facts = backbone.facts
    sites = {key.rpartition(".")[0] for key in tensors} & set(sites_of(facts.linears))
    names = options.class_names
    origin = {
        **config.extra["imported_from"],
        "file": file.name,
        "sha256": sha256_of(file),
        "preprocess_assumed": options.preprocess is None,
    }
    completed = replace(
        config,
        target_modules=_targets(facts.linears, sites) or ("proj",),
        base_model_args=dict(facts.args),
        base_sha256=facts.sha256 if options.weights_known else None,
        num_classes=len(names) if names else None,
        class_names=names,
        preprocess=options.preprocess or facts.preprocess,
        extra={"imported_from": origin},
    )
    adapter = assemble_adapter(completed, tensors, file, str(file))
    check_adapter(file.name, adapter, facts)
    return adapter


def _targets(linears: Sequence[LinearSpec], sites: set[str]) -> tuple[str, ...]:
    """Kinds where all sites of a kind are adapted, else the sites by their full names."""
    targets: list[str] = []
    for kind, members in select_sites(linears, KINDS).items():
        own = [site.name for site in members if site.name in sites]
        targets += [kind] if own and len(own) == len(members) else own
    return tuple(targets)
