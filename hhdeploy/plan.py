"""Plan an export before anything is built: checks, names, room in the rows. Pure.

Data flows: adapter files + `BackboneFacts` -> `Plan` -> graph -> bundle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from hhdeploy.adapters.checks import (
    check,
    check_live,
    check_name,
    check_sites,
    sites_there_are,
)
from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import (
    FORMS,
    SEQUENTIAL_KINDS,
    Form,
    LinearSpec,
    Site,
    select_sites,
    split_target,
)
from hhdeploy.bundle.layout import Branch, RowLayout, in_row_order
from hhdeploy.choices import listed, text, whole, yes_or_no
from hhdeploy.errors import OptionError, PlanError


@dataclass(frozen=True)
class Reserve:
    """Room for adapters that come later.

    Attributes:
        max_rank: k at every branch at least this (2 for the reflections + low-rank term).
        max_classes: classes of a head at least this.
        sites: targets such as ``fc1`` or ``proj:sequential`` that get a branch in any case.
        keep_backbone_head: keep the backbone's own classifier in the graph.
        parts: of s_in, s_out and db: room for these at every Linear that has a branch.
    """

    max_rank: int = 0
    max_classes: int = 0
    sites: tuple[str, ...] = ()
    keep_backbone_head: bool = False
    parts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_rank", "max_classes"):
            object.__setattr__(self, name, whole(getattr(self, name), name, 0))
        kept = yes_or_no(self.keep_backbone_head, "keep_backbone_head")
        object.__setattr__(self, "keep_backbone_head", kept)
        for name in ("sites", "parts"):
            object.__setattr__(
                self,
                name,
                tuple(text(n, name, "names") for n in listed(getattr(self, name), name, "names")),
            )
        for target in self.sites:
            try:
                split_target(target)
            except ValueError as error:
                raise OptionError(f"`sites`: {error}") from error
        try:
            in_row_order(self.parts)
        except ValueError as error:
            raise OptionError(f"`parts`: {error}") from error


@dataclass(frozen=True)
class Plan:
    """An export of side branches, decided. Row i + 1 of the bank is ``names[i]``."""

    facts: BackboneFacts
    names: tuple[str, ...]
    layout: RowLayout

    @property
    def classes(self) -> int:
        """Columns of the graph's logits; 0: it has none."""
        own = self.facts.classes if self.layout.backbone_head else 0
        return max(self.layout.classes, own)


def plan_branches(
    facts: BackboneFacts,
    adapters: Mapping[str, Adapter],
    reserve: Reserve,
    *,
    logits: bool = True,
) -> Plan:
    """Check the adapters against the backbone and each other, and lay out the row.

    Args:
        facts: of the backbone.
        adapters: by name; without classifiers where the graph gives no logits.
        reserve: room for later ones.
        logits: False: the graph gives features alone, a row has no head.

    Raises:
        PlanError: no adapter and nothing reserved, a head is needed that does not exist, or an
            adapter can only be folded.
        AdapterError: see `check`.
    """
    check_sites(facts)
    for name, adapter in adapters.items():
        check_name(name)
        check_live(name, adapter)
        check(name, adapter, facts)
    reserved = _reserved_sites(facts, reserve.sites)
    needs_backbone_head = any(a.head is None for a in adapters.values())
    if reserve.keep_backbone_head and facts.classes == 0:
        raise PlanError(
            f"`keep_backbone_head`: {facts.model} as loaded has no classifier of its own."
        )
    branches = [
        branch
        for linear in facts.linears
        for branch in _branches(linear, tuple(adapters.values()), reserved, reserve)
    ]
    if not branches and not adapters:
        raise PlanError("nothing to export: no adapter given and no `sites` reserved.")
    heads = [a.head.weight.shape[0] for a in adapters.values() if a.head is not None]
    classes = max([reserve.max_classes, *heads])
    keep = needs_backbone_head or reserve.keep_backbone_head or (classes == 0)
    if keep and facts.classes == 0 and logits:
        raise PlanError(
            f"{facts.model} as loaded has no classifier: give adapters that have one, or reserve "
            "room with `max_classes`."
        )
    return Plan(facts, tuple(adapters), RowLayout(tuple(branches), classes, facts.dim, keep))


def check_whole(facts: BackboneFacts) -> None:
    """Raise `PlanError` for a model to be exported as it is that has no classifier where its graph
    is to give logits."""
    if facts.classifier and not facts.classes:
        raise PlanError(
            f"{facts.model} as loaded has no classifier, so its graph has no logits. Give weights "
            "that have one, or an adapter with a head."
        )


def _branches(
    linear: LinearSpec,
    adapters: Sequence[Adapter],
    reserved: Mapping[Form, set[str]],
    reserve: Reserve,
) -> Iterator[Branch]:
    """The branches at one Linear, additive first."""
    site, names = linear.sites[0], tuple(s.name for s in linear.sites)
    ranks: dict[Form, list[int]] = {form: [] for form in FORMS}
    asked: set[str] = set()
    for adapter in adapters:
        for name in names:
            if name in adapter.sites:
                delta = adapter.delta(name)
                ranks[adapter.form] += [] if delta is None else [delta.rank]
                asked |= set(adapter.sites[name].parts)
    room = {form: not reserved[form].isdisjoint(names) for form in FORMS}
    if asked or any(ranks.values()) or any(room.values()):
        asked |= set(reserve.parts)
    for form in FORMS:
        extras = in_row_order(asked) if form == "additive" else ()
        if ranks[form] or room[form] or extras:
            # A reserved branch without an adapter has room for HTA with r = 1 unless told
            # otherwise; one that is there for its extras alone has the least that is a product.
            least = 3 if room[form] and not ranks[form] else 1
            rank = max(reserve.max_rank, least, *ranks[form])
            in_ = site.out if form == "sequential" else site.in_
            yield Branch(linear.path, form, names, site.out, in_, rank, extras)


def _reserved_sites(facts: BackboneFacts, targets: Sequence[str]) -> dict[Form, set[str]]:
    reserved: dict[Form, set[str]] = {form: set() for form in FORMS}
    for target in targets:
        name, form = split_target(target)
        sites: list[Site] = select_sites(facts.linears, [name])[name]
        if not sites:
            raise PlanError(
                f"`sites`: {name!r} matches no site of {facts.model}. {sites_there_are(facts)}"
            )
        if form == "sequential" and any(s.kind not in SEQUENTIAL_KINDS for s in sites):
            raise PlanError(
                f"`sites`: {target!r}: the sequential form acts after "
                f"{', '.join(SEQUENTIAL_KINDS)} only."
            )
        reserved[form] |= {site.name for site in sites}
    return reserved
