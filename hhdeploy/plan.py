"""Plan an export before anything is built: checks, names, room in the rows. Pure.

Data flows: adapter files + `BackboneFacts` -> `Plan` -> graph -> bundle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hhdeploy.adapters.checks import abbreviate, check_adapter, check_name, check_sites
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import (
    FORMS,
    SEQUENTIAL_KINDS,
    Form,
    LinearSpec,
    Site,
    select_sites,
    sites_of,
    split_target,
)
from hhdeploy.bundle.layout import Branch, RowLayout
from hhdeploy.errors import OptionError, PlanError


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
                f"`max_rank` and `max_classes`: expected 0 or more, found {self.max_rank} and "
                f"{self.max_classes}."
            )
        for target in self.sites:
            try:
                split_target(target)
            except ValueError as error:
                raise OptionError(f"`sites`: {error}") from error


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
            f"`keep_backbone_head`: {facts.model} as loaded has no classifier of its own."
        )
    branches = []
    for linear in facts.linears:
        for form in FORMS:
            branch = _branch(linear, form, adapters.values(), reserved, reserve.max_rank)
            if branch is not None:
                branches.append(branch)
    if not branches:
        raise PlanError("nothing to export: no adapter given and no `sites` reserved.")
    heads = [a.head.weight.shape[0] for a in adapters.values() if a.head is not None]
    classes = max([reserve.max_classes, *heads])
    keep = needs_backbone_head or reserve.keep_backbone_head or (classes == 0)
    if keep and facts.classes == 0:
        raise PlanError(
            f"{facts.model} as loaded has no classifier: give adapters that have one, or reserve "
            "room with `max_classes`."
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
                f"`sites`: {name!r} matches no site of {facts.model}. Its sites are "
                f"{abbreviate(list(sites_of(facts.linears)))}."
            )
        if form == "sequential" and any(s.kind not in SEQUENTIAL_KINDS for s in sites):
            raise PlanError(
                f"`sites`: {target!r}: the sequential form acts after "
                f"{', '.join(SEQUENTIAL_KINDS)} only."
            )
        reserved[form] |= {site.name for site in sites}
    return reserved
