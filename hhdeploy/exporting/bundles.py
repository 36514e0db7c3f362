"""Export adapters of one backbone as a bundle: plan, build, write, verify."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from hhdeploy.adapters.checks import (
    check,
    check_name,
    check_sites,
    model_args_of,
    naming,
    notes,
)
from hhdeploy.adapters.directory import adapter_files
from hhdeploy.adapters.format import Adapter, load_adapter
from hhdeploy.adapters.mixing import at_strength
from hhdeploy.backbones.facts import LOGITS
from hhdeploy.backbones.outputs import check_exchangeable
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.card import write_card
from hhdeploy.bundle.locking import BUNDLE, Progress, undisturbed
from hhdeploy.bundle.manifest import (
    LOCK_TIMEOUT,
    Manifest,
)
from hhdeploy.bundle.rounding import check_row_survives
from hhdeploy.choices import (
    TypedPrecision,
    as_seed,
    listed,
    listener,
    mapping,
    options_of,
    seconds,
    yes_or_no,
)
from hhdeploy.errors import OptionError, require
from hhdeploy.exporting.afterwards import overflow_error, verified
from hhdeploy.exporting.beforehand import (
    check_answers,
    check_contents,
    check_data,
    check_fold,
    check_precisions,
)
from hhdeploy.exporting.outputs import (
    check_outputs,
    outputs_of_graph,
    unkept_meaning,
    without_heads,
)
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.writing import as_path, cache_of, path_or_none
from hhdeploy.parity import ParityReport
from hhdeploy.plan import Reserve, plan_branches
from hhdeploy.verifying.bundles import rows_of
from hhdeploy.verifying.survival import check_folded, say

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone
    from hhdeploy.exporters.trace import BaseGraph
    from hhdeploy.exporters.writer import Contents
    from hhdeploy.verifying.reference import Reference, VerifyData

_NO_RESERVE = Reserve()


@dataclass(frozen=True)
class ExportResult:
    """What an export made.

    Attributes:
        path: the bundle, absolute.
        manifest: its manifest.
        parity: the verification, None with ``verify=False``.
    """

    path: Path
    manifest: Manifest
    parity: ParityReport | None


def export(
    model: str,
    adapters: Mapping[str, str | Path],
    out: str | Path,
    *,
    fold: bool = False,
    strengths: Mapping[str, float] = MappingProxyType({}),
    model_args: Mapping[str, Any] | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    input_size: tuple[int, int, int] | None = None,
    reserve: Reserve = _NO_RESERVE,
    bank_as_constant: bool = False,
    outputs: Sequence[str] = (),
    precisions: Sequence[TypedPrecision] = (),
    opset: int = 20,
    single_file: bool = False,
    verify: bool = True,
    verify_data: str | Path | None = None,
    verify_images: int = 4,
    allow_no_effect: bool = False,
    cache: str | Path | None = "default",
    overwrite: bool = False,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> ExportResult:
    """Export adapters of one backbone as a bundle, and verify it.

    Args:
        model: timm name, with or without ``.tag``; ``transformers:DIR_OR_HUB_ID``; or
            ``python:package.module:function``.
        adapters: name -> adapter directory.
        out: the bundle's directory; written whole or not at all.
        fold: put the one adapter into the weights, or export the model as it is where there is
            none; else all become side branches.
        strengths: name -> what the adapter's change of the backbone is multiplied by; 1 where none
            is given. The classifier is never scaled.
        model_args: further arguments of ``timm.create_model``, transformers' configuration or
            the function; None takes the adapters' (never for a function).
        checkpoint: the backbone's weights; None takes those of the source.
        pretrained: False uses random weights (``seed``): for benchmarks.
        seed: of random weights, and of the noise that is verified on.
        input_size: (channels, height, width) of the images, where the model does not say.
        reserve: room for adapters that come later (side branches).
        bank_as_constant: bake the bank into the graph.
        outputs: of the graph, some of ``logits``, ``features`` (what the classifier sees) and
            ``tokens`` (the last hidden state); none: logits, or features where neither the model
            nor an adapter has a classifier.
        precisions: further graphs to write, e.g. ``["float16"]``.
        opset: of the graphs: 20, or 18, in which Gelu is written out.
        single_file: keep weights inside of the graphs, not beside them; below 2 GB.
        verify: compare with the training-time model; a failure leaves no bundle, but where a
            typed graph's values leave the range of its type: the bundle is written without it.
        verify_data: folder of images to verify on; None: seeded noise, which parity.json says.
        verify_images: images per adapter.
        allow_no_effect: take an adapter that moves no logit on these images too, or none in one
            of ``precisions``; a line says so.
        cache: directory of traced backbones; "default": see ``default_cache``; None: no cache.
        overwrite: replace an existing bundle once the new one is complete; anything else that is
            there is refused.
        lock_timeout: seconds to wait, then, for whoever is changing the existing bundle.
        progress: called with a few words at each step.

    Raises:
        AdapterError, BackboneError, PlanError, WriteError: see their docstrings.
        ParityError: outputs differ from the training-time model by more than the table allows,
            or a graph overflows and was left out.
    """
    progress = listener(progress)
    for package in ("onnx", "onnx_ir"):
        require(package, "export", "exporting")
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec, model_name
    from hhdeploy.exporters.portable.form import GraphForm
    from hhdeploy.exporters.writer import write_bundle
    from hhdeploy.verifying.reference import VerifyData

    outputs, precisions = (
        listed(outputs, "outputs", "names"),
        listed(precisions, "precisions", "names"),
    )
    seed, lock_timeout = as_seed(seed), seconds(lock_timeout, "lock_timeout")
    model, out = model_name(model), as_path(out, "out")
    places = {
        name: as_path(place, "adapters")
        for name, place in mapping(adapters, "adapters", "names and their directories").items()
    }
    mapping(strengths, "strengths", "names and numbers")
    reserve = options_of(reserve, Reserve, "reserve")
    bank_as_constant = yes_or_no(bank_as_constant, "bank_as_constant")
    fold, overwrite = yes_or_no(fold, "fold"), yes_or_no(overwrite, "overwrite")
    data = VerifyData(path_or_none(verify_data, "verify_data"), verify_images, seed)
    check_precisions(precisions)
    form = GraphForm(opset, single_file)
    check_outputs(outputs, reserve)
    if fold:
        check_fold(len(places), reserve, bank_as_constant)
    kind = replace(
        BUNDLE, locked=partial(undisturbed, lock_timeout=lock_timeout, progress=progress)
    )
    for directory in places.values():
        adapter_files(directory, out)
    with atomic_directory(out, overwrite=overwrite, kind=kind) as scratch:
        progress("reading adapters")
        loaded = _loaded(places, strengths)
        spec = BackboneSpec(
            model,
            model_args_of(model, model_args, loaded),
            path_or_none(checkpoint, "checkpoint"),
            pretrained,
            seed,
            input_size,
        )
        progress(f"loading {model}")
        backbone = load_backbone(spec)
        loaded, asked = _admitted(
            backbone, loaded, outputs, fold, reserve, precisions, data if verify else None, progress
        )
        progress("tracing the backbone (cached for the next export)")
        alone = next(iter(loaded.values()), None) if fold else None
        base = _base(backbone, alone, cache_of(cache), asked)
        progress("folding" if fold else "adding side branches")
        contents = _contents(base, loaded, fold, reserve, bank_as_constant, precisions)
        say(progress, _rounded_away(backbone, contents, precisions, not allow_no_effect))
        reference = (
            _reference_of(backbone, contents, data, not allow_no_effect, progress)
            if verify
            else None
        )
        progress("writing graphs")
        manifest = write_bundle(scratch, contents, precisions, reference, form)
        found = None
        if verify:
            del contents, base, backbone, reference  # a session needs the memory more
            gc.collect()  # torch's graphs, and with them the weights, hold each other
            progress("verifying against the training-time model")
            written = Bundle(scratch, manifest)
            manifest, found = verified(written, data, precisions, not allow_no_effect, progress)
        manifest = write_card(Bundle(scratch, manifest))
    if found is not None and found.overflowed:
        raise overflow_error(out, found)
    return ExportResult(out.absolute(), manifest, found)


def _loaded(adapters: Mapping[str, Path], strengths: Mapping[str, float]) -> dict[str, Adapter]:
    if unknown := sorted(set(strengths) - set(adapters)):
        raise OptionError(
            f"`strengths`: expected names among {', '.join(adapters)}, found {', '.join(unknown)}."
        )
    return {
        check_name(name): at_strength(load_adapter(path), strengths.get(name, 1.0))
        for name, path in adapters.items()
    }


def _admitted(
    backbone: Backbone,
    adapters: dict[str, Adapter],
    outputs: Sequence[str],
    fold: bool,
    reserve: Reserve,
    precisions: Sequence[TypedPrecision],
    data: VerifyData | None,
    progress: Progress,
) -> tuple[dict[str, Adapter], Sequence[str]]:
    """What the loaded model and the adapters decide before the slow work, and what is to be said
    of them: the adapters as the graph takes them, and its outputs.

    Args:
        backbone: as loaded.
        adapters: by name.
        outputs: those that were asked for; see `export`, also of the next ones.
        fold, reserve, precisions: of the bundle.
        data: to verify on; None: nothing is verified.
        progress: told what is assumed.

    Raises:
        AdapterError, BackboneError, PlanError, DataError: they do not go together.
    """
    facts = backbone.facts
    for note in backbone.notes:
        progress(note)
    say(progress, [unkept_meaning(facts, reserve)])
    for number, (name, adapter) in enumerate(adapters.items()):
        say(progress, naming(name, list(adapters)[:number]))
        say(progress, notes(name, adapter, facts))
    if adapters or not fold:
        check_sites(facts)
    asked = outputs_of_graph(outputs, facts, adapters, reserve, progress)
    if LOGITS not in asked:
        adapters = without_heads(adapters, progress)
    seen = facts if LOGITS in asked else facts.without_classifier()
    answering = check_contents(seen, adapters, fold, reserve, precisions)
    if seen.classifier and (reserve.max_classes or any(a.head for a in adapters.values())):
        check_exchangeable(backbone.model, seen)
    say(progress, check_answers(backbone, adapters))
    if data is not None:
        check_data(data, answering, adapters, seen)
    return adapters, asked


def _base(
    backbone: Backbone, folded: Adapter | None, cache: Path | None, outputs: Sequence[str]
) -> BaseGraph:
    """The backbone's graph; with the parameters that the adapter to be folded replaces, if any:
    such a graph serves nobody else and is not cached."""
    from hhdeploy.adapters.applying import values_with
    from hhdeploy.backbones.parameters import values_in
    from hhdeploy.exporters.trace import base_graph

    if folded is None or not folded.values:
        return base_graph(backbone, cache, outputs)
    with values_in(backbone.model, values_with(backbone, folded), folded.source):
        return base_graph(backbone, None, outputs)


def _contents(
    base: BaseGraph,
    adapters: Mapping[str, Adapter],
    fold: bool,
    reserve: Reserve,
    bank_as_constant: bool,
    precisions: Sequence[TypedPrecision],
) -> Contents:
    from hhdeploy.exporters.writer import branches_contents, folded_contents, whole_contents

    if not fold:
        logits = bool(base.facts.classifier)
        plan = plan_branches(base.facts, adapters, reserve, logits=logits)
        return branches_contents(
            base, plan, adapters, bank_as_constant=bank_as_constant, precisions=precisions
        )
    if not adapters:
        return whole_contents(base)
    ((name, adapter),) = adapters.items()
    check(name, adapter, base.facts)
    return folded_contents(base, name, adapter)


def _rounded_away(
    backbone: Backbone, contents: Contents, precisions: Sequence[TypedPrecision], refuse: bool
) -> Iterator[str | None]:
    """Lines about what rounding leaves nothing of: in rows, or in folded weights."""
    layout, bank = contents.manifest.layout, contents.bank
    for entry in contents.manifest.adapters:
        adapter = contents.adapters.get(entry.name)
        if layout is not None and bank is not None:
            yield check_row_survives(entry.name, layout, bank[entry.row or 0], precisions)
        elif adapter is not None:
            originals = {
                path: backbone.model.get_parameter(path).detach().numpy() for path in adapter.values
            }
            yield from check_folded(
                entry.name,
                adapter,
                contents.model,
                ("float32", *precisions),
                originals=originals,
                refuse=refuse,
            )


def _reference_of(
    backbone: Backbone,
    contents: Contents,
    data: VerifyData,
    check_effect: bool,
    progress: Progress,
) -> Callable[[], Reference]:
    from hhdeploy.verifying.reference import training_time_reference

    def compute() -> Reference:
        progress("running the training-time model in float64")
        rows = rows_of(contents.manifest, contents.adapters)
        return training_time_reference(
            backbone, rows, data, contents.manifest.outputs, check_effect=check_effect
        )

    return compute
