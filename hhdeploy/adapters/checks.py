"""Whether an adapter belongs to a backbone: its base, sites, sizes, classifier."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from hhdeploy.adapters.bases import check_base, computing, unbound
from hhdeploy.adapters.config import AdapterConfig, check_class_names
from hhdeploy.adapters.format import Adapter, Part
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.licences import in_words
from hhdeploy.backbones.sites import (
    SEQUENTIAL_KINDS,
    Form,
    LinearSpec,
    Site,
    linear_spec,
    select_sites,
    sites_of,
)
from hhdeploy.errors import AdapterError, OptionError, PlanError, abbreviate
from hhdeploy.files.bundle_json import BACKBONE as BACKBONE

# What requests call a whole model that was folded without an adapter.
WHOLE = "model"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
# Devices of Windows, which has no file or folder of their names, with an ending or without.
_DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)


def check_name(name: str) -> str:
    """An adapter's name: letters, digits, dot, dash, underscore; ``backbone`` is reserved."""
    if isinstance(name, str) and name == BACKBONE:
        raise OptionError(f"the adapter name {BACKBONE!r} is reserved for the bare model.")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise OptionError(
            f"adapter name {name!r}: expected letters, digits, '.', '-' and '_' (at most 128, "
            "first a letter or digit). Choose such a name."
        )
    return name


def naming(name: str, others: Iterable[str]) -> list[str]:
    """Lines about a bundle's folder adapters/NAME that another system cannot have beside those of
    ``others``: what is fine here would come to light where somebody copies the bundle to."""
    found = []
    if _DEVICE.fullmatch(name) or name.endswith("."):
        found.append("Windows has no folder of this name")
    for other in others:
        if other != name and other.lower() == name.lower():
            found.append(f"Windows and macOS take it for the name of {other!r}")
    return [f"adapter {name!r}: {why}: the bundle cannot be copied there" for why in found]


def model_args_of(
    model: str, given: Mapping[str, Any] | None, adapters: Mapping[str, Adapter]
) -> Mapping[str, Any]:
    """The arguments that a backbone is made with: those given, else those that all adapters say.

    Raises:
        PlanError: the adapters disagree, or name arguments of a function: what a file says never
            reaches code.
    """
    if given is not None:
        return given
    named = {name: dict(a.config.base_model_args) for name, a in adapters.items()}
    if model.startswith("python:") and any(named.values()):
        raise PlanError(
            f"the adapters were made with the arguments {named}, and {model} gets none that only a "
            "file names. Pass them as `model_args`."
        )
    distinct = list({str(sorted(args.items())): args for args in named.values()}.values())
    if len(distinct) > 1:
        raise PlanError(
            "the adapters disagree on base_model_args: "
            + "; ".join(f"{name}: {args}" for name, args in named.items())
            + ". They share the backbone; to overrule, pass `model_args`."
        )
    return distinct[0] if distinct else {}


def check(name: str, adapter: Adapter, facts: BackboneFacts, *, whole: bool = True) -> None:
    """Whether an adapter belongs to a backbone: all that needs both of them.

    Args:
        name: of the adapter, for messages.
        adapter: as read, imported or in memory.
        facts: of the backbone.
        whole: False: ``facts.linears`` are not all there are, but those that a bundle's row tells.
            Whether there is room for the others is for the row to say.

    Raises:
        AdapterError: another backbone (name or digest), sites that the model does not have,
            sites that are missing, wrong sizes, a classifier under another path, class names that
            are not one per class, image sizes that disagree.
    """
    check_base(name, adapter, facts)
    known = sites_of(facts.linears)
    for site in adapter.sites:
        if site in known:
            _check_site(adapter, known[site])
            if whole:
                _check_parts(adapter, known[site])
        elif whole:
            raise AdapterError(
                f"{adapter.source}: tensor keys {site}.*: {facts.model} has no such site, or its "
                "forward pass does not use it as one Linear, or another module has its weight or "
                f"bias. {sites_there_are(facts)} "
                "Train the adapter without it (target_modules)."
            )
    _check_complete(adapter, facts, whole)
    if whole:
        check_targets(adapter.config, facts, adapter.source)
    _check_classes(adapter, facts)
    size = (adapter.config.preprocess or facts.preprocess).input_size
    if size != facts.preprocess.input_size:
        raise AdapterError(
            f"{adapter.source}: the image sizes disagree: preprocess.input_size is {list(size)}, "
            f"the backbone takes {list(facts.preprocess.input_size)}. Make the backbone of the "
            "adapter's size, as img_size does of most of timm's; an adapter that was trained on "
            "this one's size says so in its adapter_config.json."
        )


def check_targets(config: AdapterConfig, facts: BackboneFacts, source: str) -> None:
    """Every entry of ``target_modules`` stands for sites that the form can act at.

    Raises:
        AdapterError: naming ``source``, the entry, and the sites there are.
    """
    for target, sites in select_sites(facts.linears, config.target_modules).items():
        if not sites:
            raise AdapterError(
                f"{source}: target_modules: {target!r} matches no site of {facts.model}. "
                f"{sites_there_are(facts)}"
            )
        for site in sites:
            _check_form(config.form, site, source)


def notes(name: str, adapter: Adapter, facts: BackboneFacts) -> list[str]:
    """Lines about an adapter that passed `check`: what is assumed of weights, of what they compute
    and of preprocessing, and a licence that is not the backbone's."""
    stated, own = adapter.config.preprocess, facts.preprocess
    line = None
    if stated is None:
        line = (
            f"adapter {name!r} does not say how its images become inputs: assumed as the "
            f"backbone's, {own.described()}"
        )
    elif stated.described() != own.described():
        line = (
            f"adapter {name!r} takes its images in its own way, {stated.described()}; the "
            f"backbone's is {own.described()}"
        )
    lines = (
        unbound(name, adapter, facts),
        computing(name, adapter, facts),
        line,
        _other_licence(name, adapter, facts),
    )
    return [found for found in lines if found]


def _other_licence(name: str, adapter: Adapter, facts: BackboneFacts) -> str | None:
    own, base = adapter.config.license, facts.license
    if not own or not base or {n.lower() for n in own} == {n.lower() for n in base}:
        return None
    return (
        f"adapter {name!r} states the licence {in_words(own)}, its backbone {in_words(base)}: the "
        "bundle names both"
    )


def _check_site(adapter: Adapter, site: Site) -> None:
    """The form acts there, and the tensors have the matrix's size."""
    _check_form(adapter.form, site, adapter.source)
    expected = (site.out, site.out if adapter.form == "sequential" else site.in_)
    found = adapter.sites[site.name].shape
    if found is not None and found != expected:
        raise AdapterError(
            f"{adapter.source}: {site.name}: expected tensors for a {expected[0]} x {expected[1]} "
            f"matrix ({adapter.form}), found {found[0]} x {found[1]}."
        )


def _check_parts(adapter: Adapter, site: Site) -> None:
    """s_in, s_out and db have the sizes of the Linear, whatever the form."""
    sizes: dict[Part, int] = {"s_in": site.in_, "s_out": site.out, "db": site.out}
    for part, trained in adapter.sites[site.name].parts.items():
        if trained.size != sizes[part]:
            raise AdapterError(
                f"{adapter.source}: {site.name}.{part}: expected {sizes[part]} values for a "
                f"{site.out} x {site.in_} Linear, found {trained.size}."
            )


def _check_form(form: Form, site: Site, source: str) -> None:
    if form == "sequential" and site.kind not in SEQUENTIAL_KINDS:
        raise AdapterError(
            f"{source}: {site.name}: the sequential form acts after "
            f"{', '.join(SEQUENTIAL_KINDS)} only, found a site of kind {site.kind}."
        )


def _check_complete(adapter: Adapter, facts: BackboneFacts, whole: bool) -> None:
    """Every site that ``target_modules`` name has tensors; in full, whether it is known or not. So
    has every kind of which a bundle's row, which is not ``whole``, tells no site."""
    targets = adapter.config.target_modules
    selected = select_sites(facts.linears, targets)
    named = {site.name for sites in selected.values() for site in sites}
    known = [s for s in sites_of(facts.linears) if s in named]
    own = select_sites(_linears_of(adapter), targets)
    others = [t for t, s in selected.items() if not (s or own[t]) and ("." in t or not whole)]
    if missing := [s for s in (*known, *others) if s not in adapter.sites]:
        raise AdapterError(
            f"{adapter.source}: missing tensor keys for {abbreviate(missing)}: target_modules "
            f"{list(targets)} name these sites. Save the adapter whole, or list the sites it has "
            "by their full names in target_modules."
        )


def _linears_of(adapter: Adapter) -> list[LinearSpec]:
    """Of an adapter's sites, which have their names and kinds, whatever the backbone."""
    alone = [linear_spec(site, 1, 1) for site in adapter.sites]
    owners = dict.fromkeys(site.rpartition(".")[0] for site in adapter.sites)
    fused = [x for x in (linear_spec(path, 3, 1) for path in owners) if len(x.sites) > 1]
    return [*alone, *fused]  # a third is what its Linear makes it


def _check_classes(adapter: Adapter, facts: BackboneFacts) -> None:
    """There is a classifier, the adapter's at the backbone's place, and it is named whole."""
    source, head, config = adapter.source, adapter.head, adapter.config
    if head is not None:
        if not facts.classifier:
            raise AdapterError(f"{source}: {no_place(head.path, facts)}")
        if head.path != facts.classifier:
            raise AdapterError(
                f"{source}: classifier {head.path}.weight: expected {facts.classifier}.weight, "
                f"the classifier of {facts.model}."
            )
        if head.weight.shape[1] != facts.dim:
            raise AdapterError(
                f"{source}: {head.path}.weight: expected [classes, {facts.dim}], found "
                f"{list(head.weight.shape)}."
            )
    elif facts.classes == 0 and facts.classifier:
        raise AdapterError(
            f"{source}: the adapter has no classifier and neither has {facts.model} "
            f"as loaded. Expected {facts.classifier}.weight in one of them."
        )
    elif config.num_classes not in (None, facts.classes):
        raise AdapterError(
            f"{source}: num_classes: expected {facts.classes} (the backbone's classifier; the "
            f"adapter brings none), found {config.num_classes}."
        )
    classes = facts.classes if head is None else head.weight.shape[0]
    check_class_names(source, config.class_names, classes)


def no_place(head: str, facts: BackboneFacts) -> str:
    """What to do with a classifier that a model without one has no place for."""
    return (
        f"the adapter has the classifier {head}, and {facts.model} as loaded has none that it "
        "could replace. Load it with one (of transformers: "
        "`model_args={'architectures': ['ViTForImageClassification']}`, where it has such a "
        "class), or as a module of your own with a Linear behind it, python:MODULE:FUNCTION, by "
        "the adapter's names; for features alone leave the classifier out of the adapter."
    )


def check_live(name: str, adapter: Adapter) -> None:
    """Raise `PlanError` for an adapter that no side branch can compute."""
    if adapter.config.fold_only:
        what = abbreviate(list(adapter.values), 3)
        found = f"it replaces {what}" if what else "its configuration says fold_only"
        raise PlanError(
            f"adapter {name!r} can only be folded: {found}, and a row holds changes of Linears "
            "alone. Export it with `fold=True` to a bundle of its own."
        )


def headless(name: str, adapter: Adapter) -> Adapter:
    """An adapter without its classifier and what is said of it, for a graph without logits.

    Raises:
        PlanError: nothing would be left of it.
    """
    if not adapter.sites and not adapter.values:
        raise PlanError(
            f"adapter {name!r} is a classifier alone, and a graph without logits has no place for "
            "it. Export with `outputs=['logits', 'features']` for both."
        )
    said = replace(adapter.config, num_classes=None, class_names=None, problem_type=None)
    return replace(adapter, head=None, config=said)


def unused_head(name: str, adapter: Adapter) -> str | None:
    """A line about a classifier that a graph without logits does not use, or None."""
    if adapter.head is None:
        return None
    return f"adapter {name!r}: its classifier is not used, the graph gives no logits"


def check_sites(facts: BackboneFacts) -> None:
    """Raise `PlanError` for a backbone without a single Linear that adapters can change."""
    if not facts.linears:
        raise PlanError(
            f"zero sites found in {facts.model}: expected Linears before the classifier. This "
            "architecture is not supported."
        )


def sites_there_are(facts: BackboneFacts) -> str:
    """A sentence that names the sites of a backbone, or says that it has none."""
    known = list(sites_of(facts.linears))
    return f"Its sites are {abbreviate(known)}." if known else "It has no Linear but a classifier."
