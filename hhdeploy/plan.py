"""Plan an export before anything is built: checks, names, room in the rows. Pure.

Data flows: adapter files + `BackboneFacts` -> `Plan` -> graph -> bundle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hhdeploy.adapter import Adapter
from hhdeploy.errors import AdapterError, OptionError, PlanError
from hhdeploy.preprocess import Preprocess
from hhdeploy.rows import Branch, RowLayout
from hhdeploy.sites import (
    FORMS,
    SEQUENTIAL_KINDS,
    Form,
    LinearSpec,
    Site,
    select_sites,
    sites_of,
    split_target,
)

BACKBONE = "backbone"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True)
class BackboneFacts:
    """What planning needs to know of the frozen timm model.

    Attributes:
        model: timm name with its tag.
        args: further arguments of ``timm.create_model``.
        sha256: digest of the frozen weights (design of the adapter format, ``base_sha256``).
        linears: the Linears that adapters can change, in execution order.
        classifier: module path of the classifier.
        dim: features that the classifier sees.
        classes: classes of the backbone's own classifier, 0 if it has none.
        preprocess: timm's evaluation transform of the model.
    """

    model: str
    args: Mapping[str, Any]
    sha256: str
    linears: tuple[LinearSpec, ...]
    classifier: str
    dim: int
    classes: int
    preprocess: Preprocess

    def to_json(self) -> dict[str, Any]:
        """The manifest's ``backbone`` entry, without the Linears (the row layout has them)."""
        return {
            "model": self.model,
            "args": dict(self.args),
            "sha256": self.sha256,
            "classifier": self.classifier,
            "dim": self.dim,
            "classes": self.classes,
            "preprocess": self.preprocess.to_json(),
        }


@dataclass(frozen=True)
class Reserve:
    """Room for adapters that come later.

    Attributes:
        max_rank: k at every branch at least this (2 for the reflections + low-rank term).
        max_classes: classes of a head at least this.
        sites: targets such as ``fc1`` or ``proj:sequential`` that get a branch in any case.
        keep_backbone_head: keep the backbone's own classifier in the graph.
    """

    max_rank: int = 0
    max_classes: int = 0
    sites: tuple[str, ...] = ()
    keep_backbone_head: bool = False

    def __post_init__(self) -> None:
        if self.max_rank < 0 or self.max_classes < 0:
            raise OptionError(
                f"--max-rank and --max-classes: expected 0 or more, found {self.max_rank} and "
                f"{self.max_classes}."
            )
        for target in self.sites:
            try:
                split_target(target)
            except ValueError as error:
                raise OptionError(f"--sites: {error}") from error


def check_name(name: str) -> str:
    """An adapter's name: letters, digits, dot, dash, underscore; ``backbone`` is reserved."""
    if name == BACKBONE:
        raise OptionError(f"the adapter name {BACKBONE!r} is reserved for the bare model.")
    if not _NAME.fullmatch(name):
        raise OptionError(
            f"adapter name {name!r}: expected letters, digits, '.', '-' and '_' (at most 128, "
            "first a letter or digit). Give one: NAME=DIR."
        )
    return name


def check_adapter(name: str, adapter: Adapter, facts: BackboneFacts) -> None:
    """Everything about one adapter that needs the backbone to be checked.

    Raises:
        AdapterError: another backbone (name or digest), sites that the model does not have,
            sites that are missing, wrong sizes, a classifier under another path, image sizes
            that disagree.
    """
    source, config = adapter.source, adapter.config
    check_base(name, adapter, facts.model, facts.sha256)
    known = sites_of(facts.linears)
    for site, tensors in adapter.sites.items():
        if site not in known:
            raise AdapterError(
                f"{source}: tensor keys {site}.*: {facts.model} has no such site. Its sites are "
                f"{_abbreviate(list(known))}."
            )
        if adapter.form == "sequential" and known[site].kind not in SEQUENTIAL_KINDS:
            raise AdapterError(
                f"{source}: {site}: the sequential form acts after {', '.join(SEQUENTIAL_KINDS)} "
                f"only, found a site of kind {known[site].kind}."
            )
        expected = (known[site].out, known[site].in_)
        if adapter.form == "sequential":
            expected = (known[site].out, known[site].out)
        if tensors.shape != expected:
            raise AdapterError(
                f"{source}: {site}: expected tensors for a {expected[0]} x {expected[1]} matrix "
                f"({adapter.form}), found {tensors.shape[0]} x {tensors.shape[1]}."
            )
    expected_sites = set()
    for target, sites in select_sites(facts.linears, config.target_modules).items():
        if not sites:
            raise AdapterError(
                f"{source}: target_modules: {target!r} matches no site of {facts.model}. Its "
                f"sites are {_abbreviate(list(known))}."
            )
        expected_sites |= {site.name for site in sites}
    if missing := [s for s in known if s in expected_sites and s not in adapter.sites]:
        raise AdapterError(
            f"{source}: missing tensor keys for {_abbreviate(missing)}: target_modules "
            f"{list(config.target_modules)} name these sites. Save the adapter whole, or list "
            "the sites it has by their full names in target_modules."
        )
    if adapter.head is not None:
        if adapter.head.path != facts.classifier:
            raise AdapterError(
                f"{source}: classifier {adapter.head.path}.weight: expected "
                f"{facts.classifier}.weight, timm's path for {facts.model}."
            )
        if adapter.head.weight.shape[1] != facts.dim:
            raise AdapterError(
                f"{source}: {adapter.head.path}.weight: expected [classes, {facts.dim}], found "
                f"{list(adapter.head.weight.shape)}."
            )
    elif facts.classes == 0:
        raise AdapterError(
            f"{source}: the adapter has no classifier and neither has {facts.model} "
            f"as loaded. Expected {facts.classifier}.weight in one of them."
        )
    elif config.num_classes not in (None, facts.classes):
        raise AdapterError(
            f"{source}: num_classes: expected {facts.classes} (the backbone's classifier; the "
            f"adapter brings none), found {config.num_classes}."
        )
    size = config.preprocess.input_size if config.preprocess else facts.preprocess.input_size
    if size != facts.preprocess.input_size:
        raise AdapterError(
            f"{source}: the image sizes disagree: preprocess.input_size is {list(size)}, the "
            f"backbone takes {list(facts.preprocess.input_size)}."
        )


def check_base(name: str, adapter: Adapter, model: str, sha256: str) -> None:
    """The adapter was trained on this backbone, as far as both sides say."""
    config = adapter.config
    theirs, _, their_tag = config.base_model.partition(".")
    ours, _, our_tag = model.partition(".")
    if theirs != ours or (their_tag and our_tag and their_tag != our_tag):
        raise AdapterError(
            f"{adapter.source}: base_model_name_or_path: adapter {name!r} expects "
            f"{config.base_model}, the backbone is {model}."
        )
    if config.base_sha256 is not None and config.base_sha256 != sha256:
        raise AdapterError(
            f"{adapter.source}: base_sha256: adapter {name!r} was trained on the weights "
            f"{config.base_sha256[:12]}…, the backbone's are {sha256[:12]}…. Use the checkpoint "
            "that it was trained on, also for the bundle: export with --checkpoint."
        )


@dataclass(frozen=True)
class Plan:
    """An export of side branches, decided. Row i + 1 of the bank is ``names[i]``."""

    facts: BackboneFacts
    names: tuple[str, ...]
    layout: RowLayout

    @property
    def classes(self) -> int:
        """Columns of the graph's logits."""
        own = self.facts.classes if self.layout.backbone_head else 0
        return max(self.layout.classes, own)


def plan_branches(facts: BackboneFacts, adapters: Mapping[str, Adapter], reserve: Reserve) -> Plan:
    """Check the adapters against the backbone and each other, and lay out the row.

    Raises:
        PlanError: no adapter and nothing reserved, or a head is needed that does not exist.
        AdapterError: see `check_adapter`.
    """
    check_sites(facts)
    for name, adapter in adapters.items():
        check_name(name)
        check_adapter(name, adapter, facts)
    reserved = _reserved_sites(facts, reserve.sites)
    needs_backbone_head = any(a.head is None for a in adapters.values())
    if reserve.keep_backbone_head and facts.classes == 0:
        raise PlanError(
            f"--keep-backbone-head: {facts.model} as loaded has no classifier of its own."
        )
    branches = []
    for linear in facts.linears:
        for form in FORMS:
            branch = _branch(linear, form, adapters.values(), reserved, reserve.max_rank)
            if branch is not None:
                branches.append(branch)
    if not branches:
        raise PlanError("nothing to export: no adapter given and no --sites reserved.")
    heads = [a.head.weight.shape[0] for a in adapters.values() if a.head is not None]
    classes = max([reserve.max_classes, *heads])
    keep = needs_backbone_head or reserve.keep_backbone_head or (classes == 0)
    if keep and facts.classes == 0:
        raise PlanError(
            f"{facts.model} as loaded has no classifier: give adapters that have one, or reserve "
            "room with --max-classes."
        )
    return Plan(facts, tuple(adapters), RowLayout(tuple(branches), classes, facts.dim, keep))


def _branch(
    linear: LinearSpec,
    form: Form,
    adapters: Sequence[Adapter] | Any,
    reserved: Mapping[Form, set[str]],
    max_rank: int,
) -> Branch | None:
    names = tuple(site.name for site in linear.sites)
    ranks = [a.delta(n).rank for a in adapters if a.form == form for n in names if n in a.sites]
    if not ranks and reserved[form].isdisjoint(names):
        return None
    site = linear.sites[0]
    in_ = site.out if form == "sequential" else site.in_
    # A reserved branch without an adapter has room for HTA with r = 1 unless told otherwise.
    return Branch(linear.path, form, names, site.out, in_, max([max_rank, *(ranks or [3])]))


def _reserved_sites(facts: BackboneFacts, targets: Sequence[str]) -> dict[Form, set[str]]:
    reserved: dict[Form, set[str]] = {form: set() for form in FORMS}
    for target in targets:
        name, form = split_target(target)
        sites: list[Site] = select_sites(facts.linears, [name])[name]
        if not sites:
            raise PlanError(
                f"--sites: {name!r} matches no site of {facts.model}. Its sites are "
                f"{_abbreviate(list(sites_of(facts.linears)))}."
            )
        if form == "sequential" and any(s.kind not in SEQUENTIAL_KINDS for s in sites):
            raise PlanError(
                f"--sites: {target!r}: the sequential form acts after "
                f"{', '.join(SEQUENTIAL_KINDS)} only."
            )
        reserved[form] |= {site.name for site in sites}
    return reserved


def check_sites(facts: BackboneFacts) -> None:
    """Raise `PlanError` for a backbone without a single Linear that adapters can change."""
    if not facts.linears:
        raise PlanError(
            f"zero sites found in {facts.model}: expected Linears named attn.qkv (or q, k, v "
            "apart), attn.proj, mlp.fc1 or mlp.fc2. This architecture is not supported."
        )


def _abbreviate(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
