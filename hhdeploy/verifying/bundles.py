"""Verify a bundle: its files with their hashes, its graphs with the training-time model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.adapters.bases import check_base, unbound
from hhdeploy.adapters.checks import BACKBONE, headless
from hhdeploy.adapters.format import Adapter
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.locking import check_changeable
from hhdeploy.bundle.manifest import PARITY_FILE, REFERENCE_FILE, Manifest
from hhdeploy.bundle.reading import read_bundle
from hhdeploy.bundle.store import LOCK_TIMEOUT, Basis, Change, Progress, edit
from hhdeploy.choices import (
    DEVICES,
    Device,
    Precision,
    as_precisions,
    as_seed,
    listener,
    one_of,
    seconds,
)
from hhdeploy.errors import BackboneError, BundleError, as_code, require
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.files.writing import json_bytes, path_or_none
from hhdeploy.parity import ParityReport
from hhdeploy.verifying.answers import parity_error, runner_of, unmeasured, verify_graphs
from hhdeploy.verifying.contents import check_contents
from hhdeploy.verifying.pictures import check_pictures
from hhdeploy.verifying.survival import Effects, say

if TYPE_CHECKING:
    from hhdeploy.backbones.spec import Backbone
    from hhdeploy.verifying.reference import Reference


def verify(
    path: str | Path, *, device: Device = "cpu", precisions: Sequence[Precision] | None = None
) -> ParityReport:
    """Compare a bundle with the reference it carries, and its files with their hashes.

    float32 needs no torch. Where onnx and onnx_ir are installed, the weights of the other graphs,
    quantised ones that noise cannot show included, are compared with float32's too, to the bit.

    Args:
        path: the bundle.
        device: see ``open_session``; ``auto`` is judged by what it means here.
        precisions: graphs to check, None: all. One that is not float32 is checked through its
            rounding twin, which needs the ``export`` extra (onnx_ir), not torch.

    Returns:
        The report; the caller decides what a failure means (``report.passed``).

    Raises:
        BundleError: no bundle, no reference, a file that was changed, or a graph with others than
            the float32 graph's weights.
        OptionError: no such device or precision anywhere.
    """
    where, which = one_of(DEVICES, device, "device"), as_precisions(precisions)
    return read_bundle(path, lambda bundle: _verify(bundle, where, which))


def _verify(bundle: Bundle, device: Device, precisions: Sequence[Precision] | None) -> ParityReport:
    bundle.check_files()
    if not bundle.manifest.has(REFERENCE_FILE):
        raise BundleError(
            f"{bundle.path} was exported without verification and carries no reference. Run: "
            f"{as_code('verify_against_torch', bundle.path)}"
        )
    report = verify_graphs(bundle, device, precisions)
    if report.passed:
        check_contents(bundle, precisions)
    if _shows_pictures(bundle, device, precisions):
        report = replace(report, pictures=check_pictures(bundle))
    return report


def verify_against_torch(
    path: str | Path,
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_size: tuple[int, int, int] | None = None,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    seed: int = 0,
    verify_data: str | Path | None = None,
    verify_images: int = 4,
    device: Device = "cpu",
    precisions: Sequence[Precision] | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> ParityReport:
    """Recompute the reference with torch, adapters added later included, and verify.

    On success the bundle gets the new reference and report, and all its adapters count as
    verified but those that others added or replaced meanwhile; on failure it stays as it was. So
    it does where float32 is not among the graphs that are checked (``precisions``; None: all, of a
    backend its engines): the other graphs' bounds are too wide to vouch for an adapter.

    Args:
        path: the bundle.
        model: as in `export`; None: what the manifest says. A directory and a function have to
            be named. So the five that follow.
        model_args: as in `export`.
        input_size: as in `export`.
        checkpoint: as in `export`.
        pretrained: as in `export`.
        seed: as in `export`.
        verify_data: as in `export`.
        verify_images: as in `export`.
        device: as in `verify`.
        precisions: as in `verify`.
        lock_timeout: seconds to wait for another process that is changing the bundle.
        progress: called with a few words at each step.

    Raises:
        BackboneError: the weights are not the ones that the bundle was exported from, or the
            model has to be named.
        AdapterError: one was trained on other weights.
        BundleError: a file of the bundle is damaged, the float32 graph has others than the model's
            weights (`check_originals`), a graph others than the float32 graph's, or the manifest
            tells another classifier than the model's.
        ConflictError: the bundle was exported again meanwhile.
        OptionError: no such device or precision anywhere.
        ParityError: outputs differ by more than the table allows.
    """
    progress, seed = listener(progress), as_seed(seed)
    require("onnx_ir", "export", "comparing a bundle's weights with the model's")
    device, precisions = one_of(DEVICES, device, "device"), as_precisions(precisions)
    lock_timeout = seconds(lock_timeout, "lock_timeout")
    from hhdeploy.backbones.loading import load_backbone
    from hhdeploy.backbones.spec import BackboneSpec
    from hhdeploy.verifying.originals import check_originals, check_stated
    from hhdeploy.verifying.reference import VerifyData, training_time_reference

    data = VerifyData(path_or_none(verify_data, "verify_data"), verify_images, seed)
    bundle = read_bundle(path, _held)
    facts = bundle.manifest.backbone
    if precisions is None or "float32" in precisions:
        check_changeable(bundle.path)
    if model is None:
        _check_named(bundle)
    spec = BackboneSpec(
        model or facts.model,
        facts.args if model_args is None else model_args,
        path_or_none(checkpoint, "checkpoint"),
        pretrained,
        seed,
        bundle.manifest.input_size if input_size is None else input_size,
    )
    backbone = load_backbone(spec)
    _check_weights(bundle, backbone)
    names = [a.name for a in bundle.manifest.adapters if not bundle.manifest.whole]
    adapters = {name: bundle.load_adapter(name) for name in names}
    say(progress, check_stated(bundle, backbone))
    for name, adapter in adapters.items():  # older bundles could not compare all that they took
        check_base(name, adapter, backbone.facts)
        if line := unbound(name, adapter, backbone.facts):
            progress(line)
    rows = rows_of(bundle.manifest, adapters)
    reference = training_time_reference(backbone, rows, data, bundle.manifest.outputs)
    effects = Effects.of_reference(bundle, reference)
    also = effects.measure if device == "cpu" else unmeasured  # others have no twins at hand
    report = verify_graphs(bundle, device, precisions, reference, data, also=also)
    if not report.passed:
        raise parity_error(report)
    check_contents(bundle, precisions)
    say(progress, [check_originals(bundle, backbone, adapters)])
    if device == "cpu":
        shown = dict.fromkeys(stage.precision for stage in report.stages)
        say(progress, effects.lines([*shown], refuse=False))
    if _shows_pictures(bundle, device, precisions):
        report = replace(report, pictures=check_pictures(bundle, added_later=True))
    if "float32" not in {stage.precision for stage in report.stages}:
        return report
    basis = Basis.of(bundle.manifest)
    with edit(path, basis, lock_timeout=lock_timeout, progress=progress) as change:
        _store_verification(change, basis, reference, report)
    return report


def _check_weights(bundle: Bundle, backbone: Backbone) -> None:
    """Raise `BackboneError` for a model with others than the bundle was exported from."""
    own, found = bundle.manifest.backbone, backbone.facts
    if found.sha256 != own.sha256:
        raise BackboneError(
            f"{bundle.path} was exported from the weights {own.sha256[:12]}…, these are "
            f"{found.sha256[:12]}…. Pass the same file with `checkpoint`."
        )
    if own.buffers and found.buffers != own.buffers:
        raise BackboneError(
            f"{bundle.path} was exported with the buffers {own.buffers[:12]}… (statistics of "
            f"BatchNorm, masks), these are {found.buffers[:12]}…: the weights are the same, what "
            "they compute is not. Pass the same file with `checkpoint`."
        )


def _check_named(bundle: Bundle) -> None:
    """The manifest names a model that can be had from its name, and no code to run.

    Raises:
        BackboneError: it does not.
    """
    name = bundle.manifest.backbone.model
    folder = name.startswith("transformers:") and "/" not in name
    if folder or name.startswith("python:"):
        raise BackboneError(
            f"{bundle.path} was exported from {name}: "
            f"{'a directory' if folder else 'a function, and what a file names is never run'}. "
            "Pass `model`, as in export."
        )


def _held(bundle: Bundle) -> Bundle:
    bundle.check_files()
    return bundle.hold()


def _store_verification(
    change: Change, basis: Basis, reference: Reference, report: ParityReport
) -> None:
    """What was verified and is still there: reference, report, and the adapters' marks."""
    manifest = change.manifest
    adapters, graphs = basis.kept_adapters(manifest), basis.kept_graphs(manifest)
    rows = [0, *(basis.adapters[name][0] or 0 for name in adapters)]
    change.store(REFERENCE_FILE, tensor_bytes(reference.of_rows(rows).tensors(manifest)))
    stages = [
        s.to_json()
        for s in report.stages
        if s.adapter in {*adapters, BACKBONE} and s.precision in graphs
    ]
    # Of graphs that were not checked, or that others added or replaced meanwhile.
    checked = graphs & {s.precision for s in report.stages}
    if manifest.has(PARITY_FILE):
        stages += [s for s in change.bundle.parity()["stages"] if s["precision"] not in checked]
    change.store(PARITY_FILE, json_bytes({**report.to_json(), "stages": stages}))
    # Not those that another verification marked meanwhile: they are not in this reference.
    marked = tuple(replace(a, verified=a.name in adapters) for a in manifest.adapters)
    change.manifest = replace(change.manifest, adapters=marked)


def rows_of(
    manifest: Manifest, adapters: Mapping[str, Adapter]
) -> dict[str, tuple[int, Adapter | None]]:
    """Name -> (row, adapter) of everything a request can ask for, the backbone included."""
    rows: dict[str, tuple[int, Adapter | None]] = {}
    if manifest.answers_backbone:
        rows[BACKBONE] = (0, None)
    for entry in manifest.adapters:
        adapter = adapters.get(entry.name)  # none of a whole model
        if adapter is not None and not manifest.classes:
            adapter = headless(entry.name, adapter)
        rows[entry.name] = (entry.row or 0, adapter)
    return rows


def _shows_pictures(bundle: Bundle, device: Device, precisions: Sequence[Precision] | None) -> bool:
    """Whether float32 on the CPU is asked for, by which graphs that take pictures are compared."""
    float32 = precisions is None or "float32" in precisions
    return float32 and runner_of(bundle.manifest, device, "float32") == "cpu"
