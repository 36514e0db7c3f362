"""What every importer shares: its options, and how tensors become sites of an adapter.

A source's module reads its files and says what their tensors mean; `finish` completes the
configuration and checks the adapter as any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import check
from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter, assemble_adapter
from hhdeploy.algebra import Reflection
from hhdeploy.backbones.sites import KINDS, Form, LinearSpec, select_sites, sites_of
from hhdeploy.errors import AdapterError
from hhdeploy.files.writing import sha256_of
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone


Tensors = dict[str, NDArray[Any]]


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


def head_keys(backbone: Backbone) -> tuple[str, str]:
    """Keys of the classifier's weight and bias in the backbone's state dict."""
    return f"{backbone.facts.classifier}.weight", f"{backbone.facts.classifier}.bias"


def linear_of(
    linears: Mapping[str, LinearSpec], name: str, file: Path, backbone: Backbone
) -> LinearSpec:
    """The Linear of that path; ``file`` is what the message names. Raises `AdapterError`."""
    if name not in linears:
        raise AdapterError(
            f"{file}: {name}: {backbone.facts.model} has no such site. Expected "
            f"{', '.join(list(linears)[:4])}, …; convolutions (patch_embed), the classifier and "
            "other layers cannot be adapted."
        )
    return linears[name]


def split_thirds(linear: LinearSpec, a: NDArray[Any], b: NDArray[Any], file: Path) -> Tensors:
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


def finish(
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
    check(file.name, adapter, facts)
    return adapter


def _targets(linears: Sequence[LinearSpec], sites: set[str]) -> tuple[str, ...]:
    """Kinds where all sites of a kind are adapted, else the sites by their full names."""
    targets: list[str] = []
    for kind, members in select_sites(linears, KINDS).items():
        own = [site.name for site in members if site.name in sites]
        targets += [kind] if own and len(own) == len(members) else own
    return tuple(targets)


def low_rank_pair(
    group: Mapping[str, NDArray[Any]], name: str, file: Path
) -> tuple[NDArray[Any], NDArray[Any]]:
    """lora_A and lora_B of one module. Raises `AdapterError` unless there are these two."""
    if set(group) != {"lora_A", "lora_B"}:
        raise AdapterError(
            f"{file}: {name}: expected lora_A and lora_B, found {', '.join(sorted(group))}."
        )
    return group["lora_A"], group["lora_B"]
