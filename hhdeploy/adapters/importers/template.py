"""What every importer shares: its options, and how tensors become an adapter.

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
from hhdeploy.adapters.config import AdapterConfig, ProblemType
from hhdeploy.adapters.format import Adapter, assemble_adapter
from hhdeploy.adapters.importers.compressing import compressed
from hhdeploy.algebra import REFLECTIONS, Reflection
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import FORMS, KINDS, Form, LinearSpec, select_sites, sites_of
from hhdeploy.choices import PROBLEM_TYPES, listed, number, of_kind, one_of, text
from hhdeploy.errors import AdapterError, BackboneError, OptionError
from hhdeploy.files.weights import files_of
from hhdeploy.files.writing import path_or_none, sha256_of, sha256_of_bytes
from hhdeploy.preprocess import Preprocess

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone


Tensors = dict[str, NDArray[Any]]
# Ending of the key that holds the new value of a whole parameter.
VALUE = ".value"


@dataclass(frozen=True)
class ImportOptions:
    """What the source does not say.

    Attributes:
        form: of a .pth file; None: additive. PEFT's methods are additive.
        reflection: of a .pth file; None: unnormalized.
        prefix: stripped from every tensor key, before or after PEFT's own ``base_model.model.``.
        lora_scale: of a .pth file: factor of lora_B lora_A, for files that keep alpha / r apart.
        class_names: one per class, or None.
        problem_type: what the head's numbers mean; None: what the number of classes tells.
        preprocess: how images become inputs; None: what the source says, else the backbone's.
        weights_known: False: the backbone's weights are placeholders, so ``base_sha256`` stays
            null and whatever needs the weights (all but plain LoRA) is refused.
        key_map: of a .pth file with other keys: a JSON file that says what they mean; see
            `hhdeploy.adapters.importers.keymap`.
        adapter_name: which adapter of a file that holds several.
        compress_rank: make dense changes of Linears products of this rank, so that the adapter can
            be a side branch; None: it is exact, and folded where it has to be.
        accept_error: share of the logits' range that the compression may lose; None: a default.
    """

    form: Form | None = None
    reflection: Reflection | None = None
    prefix: str = ""
    lora_scale: float = 1.0
    class_names: tuple[str, ...] | None = None
    problem_type: ProblemType | None = None
    preprocess: Preprocess | None = None
    weights_known: bool = True
    key_map: Path | None = None
    adapter_name: str | None = None
    compress_rank: int | None = None
    accept_error: float | None = None

    def __post_init__(self) -> None:
        if self.class_names is not None:
            names = listed(self.class_names, "class_names", "names, one a class,")
            object.__setattr__(self, "class_names", tuple(names))
        chosen = {"form": FORMS, "reflection": REFLECTIONS, "problem_type": PROBLEM_TYPES}
        for name, known in chosen.items():
            if (value := getattr(self, name)) is not None:
                one_of(known, value, name)
        text(self.prefix, "prefix", "the start of keys")
        object.__setattr__(self, "lora_scale", number(self.lora_scale, "lora_scale"))
        if self.accept_error is not None:
            object.__setattr__(self, "accept_error", number(self.accept_error, "accept_error"))
        object.__setattr__(self, "key_map", path_or_none(self.key_map, "key_map"))
        if self.preprocess is None:
            return
        of_kind(self.preprocess, Preprocess, "preprocess")
        try:
            self.preprocess.check_scale()
        except ValueError as error:
            raise OptionError(f"`preprocess`: {error}.") from error


def largest_rank(tensors: Tensors) -> int:
    """Of the products among an adapter's tensors; 0 without one."""
    return max((len(t) for name, t in tensors.items() if name.endswith(".lora_A")), default=0)


def head_keys(backbone: Backbone) -> tuple[str, str]:
    """Keys of the classifier's weight and bias in the backbone's state dict."""
    return f"{backbone.facts.classifier}.weight", f"{backbone.facts.classifier}.bias"


def linear_at(facts: BackboneFacts, path: str) -> LinearSpec | None:
    """The Linear at a module path, or one third of a fused one by the name of its site."""
    for linear in facts.linears:
        if linear.path == path:
            return linear
        for site in linear.sites:
            if site.name == path:
                return LinearSpec(linear.path, site.out, site.in_, (site,))
    return None


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


def low_rank_pair(
    group: Mapping[str, NDArray[Any]], name: str, file: Path
) -> tuple[NDArray[Any], NDArray[Any]]:
    """lora_A and lora_B of one module. Raises `AdapterError` unless there are these two."""
    if set(group) != {"lora_A", "lora_B"}:
        raise AdapterError(
            f"{file}: {name}: expected lora_A and lora_B, found {', '.join(sorted(group))}."
        )
    return group["lora_A"], group["lora_B"]


def stated_preprocess(
    directory: Path, backbone: Backbone, options: ImportOptions
) -> Preprocess | None:
    """The transform of transformers' image processor beside an adapter; None without its file, or
    where ``options`` say it.

    Raises:
        AdapterError: a file that cannot be read, or steps that cannot be expressed.
    """
    from hhdeploy.backbones.transformers import stated_transform

    if options.preprocess is not None:
        return None
    try:
        found = stated_transform(str(directory), backbone.facts.preprocess.input_size)
    except BackboneError as error:
        raise AdapterError(
            f"{directory}: {error} Say how images become inputs with `preprocess`."
        ) from error
    return None if found is None else found[0]


def finish(
    tensors: Tensors,
    config: AdapterConfig,
    file: Path,
    backbone: Backbone,
    options: ImportOptions,
    stated: Preprocess | None = None,
) -> Adapter:
    """Complete the configuration, then check the adapter as any other.

    Args:
        tensors: by the keys of an adapter's file.
        config: what the source says, ``imported_from`` among its extra keys.
        file: what was read.
        backbone: what the adapter belongs to.
        options: of the import.
        stated: how the source says that images become inputs; ``options`` has the last word.
    """
    facts = backbone.facts
    sites = {key.rpartition(".")[0] for key in tensors} & set(sites_of(facts.linears))
    names = options.class_names
    preprocess = options.preprocess or stated
    origin = {
        **config.extra["imported_from"],
        "file": file.name,
        "sha256": _digest(file),
        "preprocess_assumed": preprocess is None,
    }
    completed = replace(
        config,
        target_modules=_targets(facts.linears, sites),
        base_model_args=dict(facts.args),
        base_sha256=facts.sha256 if options.weights_known else None,
        base_buffers=facts.buffers or None if options.weights_known else None,
        num_classes=len(names) if names else None,
        class_names=names,
        problem_type=options.problem_type or config.problem_type,
        preprocess=preprocess or facts.preprocess,
        fold_only=any(key.endswith(VALUE) for key in tensors),
        extra={"imported_from": origin},
    )
    adapter = assemble_adapter(completed, tensors, file, str(file))
    if options.compress_rank is not None:
        adapter = compressed(adapter, backbone, options.compress_rank, options.accept_error)
    elif options.accept_error is not None:
        raise OptionError("`accept_error` is for `compress_rank`.")
    check(file.name, adapter, facts)
    return adapter


def _digest(file: Path) -> str:
    """sha256 of what was read: of a divided model's index, over those of the files it lists."""
    digests = [sha256_of(each) for each in files_of(file)]
    return digests[0] if len(digests) == 1 else sha256_of_bytes(" ".join(digests).encode())


def _targets(linears: Sequence[LinearSpec], sites: set[str]) -> tuple[str, ...]:
    """Kinds where all sites of a kind are adapted, else the sites by their full names."""
    targets: list[str] = []
    for kind, members in select_sites(linears, KINDS).items():
        own = [site.name for site in members if site.name in sites]
        targets += [kind] if own and len(own) == len(members) else own
    by_kind = {site.name for members in select_sites(linears, KINDS).values() for site in members}
    return (*targets, *(name for name in sites_of(linears) if name in sites - by_kind))
