"""Whether an adapter belongs to a backbone: names, digests, sites, sizes, classifier."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hhdeploy.adapters.format import Adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.sites import SEQUENTIAL_KINDS, select_sites, sites_of
from hhdeploy.errors import AdapterError, OptionError, PlanError

BACKBONE = "backbone"


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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
                f"{source}: tensor keys {site}.*: {facts.model} has no such site, or its forward "
                "pass does not use it. Its sites are "
                f"{abbreviate(list(known))}."
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
                f"sites are {abbreviate(list(known))}."
            )
        expected_sites |= {site.name for site in sites}
    if missing := [s for s in known if s in expected_sites and s not in adapter.sites]:
        raise AdapterError(
            f"{source}: missing tensor keys for {abbreviate(missing)}: target_modules "
            f"{list(config.target_modules)} name these sites. Save the adapter whole, or list "
            "the sites it has by their full names in target_modules."
        )
    if adapter.head is not None:
        if adapter.head.path != facts.classifier:
            raise AdapterError(
                f"{source}: classifier {adapter.head.path}.weight: expected "
                f"{facts.classifier}.weight, the classifier of {facts.model}."
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
    """The adapter was trained on this backbone, as far as both sides say.

    The digest of the weights decides, whatever the model is called on either side. Without one,
    timm's names are compared; of other sources sites and sizes alone can tell.
    """
    config = adapter.config
    if config.base_sha256 == sha256:
        return
    theirs, _, their_tag = config.base_model.partition(".")
    ours, _, our_tag = model.partition(".")
    timm = ":" not in theirs and ":" not in ours
    if timm and (theirs != ours or (their_tag and our_tag and their_tag != our_tag)):
        raise AdapterError(
            f"{adapter.source}: base_model_name_or_path: adapter {name!r} expects "
            f"{config.base_model}, the backbone is {model}."
        )
    if config.base_sha256 is not None:
        raise AdapterError(
            f"{adapter.source}: base_sha256: adapter {name!r} was trained on the weights "
            f"{config.base_sha256[:12]}…, the backbone's are {sha256[:12]}…. Use the checkpoint "
            "that it was trained on, also for the bundle: export with --checkpoint."
        )


def check_sites(facts: BackboneFacts) -> None:
    """Raise `PlanError` for a backbone without a single Linear that adapters can change."""
    if not facts.linears:
        raise PlanError(
            f"zero sites found in {facts.model}: expected Linears before the classifier. This "
            "architecture is not supported."
        )


def abbreviate(names: Sequence[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown}, … ({len(names)} in all)"
