"""Rows of a bank as files of ONNX Runtime's own adapter format, ``.onnx_adapter``, and back.

Such a file holds what a run of a graph is fed beside its inputs: here ``adapter_bank``, one row, so
that every image's ``adapter_ids`` is 0.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.config import AdapterConfig
from hhdeploy.adapters.format import Adapter, Head, SiteTensors
from hhdeploy.backbones.facts import NO_BUFFERS
from hhdeploy.backbones.sites import Form
from hhdeploy.bundle.layout import Branch, RowLayout
from hhdeploy.bundle.manifest import Manifest
from hhdeploy.bundle.reading import Bundle, read_bundle
from hhdeploy.errors import AdapterError, PlanError, WriteError, first_line, require
from hhdeploy.files.outputs import output_file
from hhdeploy.files.plain import open_plain, what_instead
from hhdeploy.files.writing import write_bytes

_BANK = "adapter_bank"
_VERSION = 1
_USE = "files of ONNX Runtime's adapter format"


def pack_adapter(path: str | Path, name: str, file: str | Path) -> None:
    """Write an adapter's row as an ``.onnx_adapter`` file.

    Args:
        path: the bundle.
        name: of its adapter.
        file: it is replaced if it is there.

    Raises:
        PlanError: the bundle's adapters are in its graph.
        BundleError: no such adapter, or a damaged bundle. WriteError: the file system refused.
    """
    ort = require("onnxruntime", "cpu", _USE)

    def read(bundle: Bundle) -> tuple[Manifest, NDArray[np.float32]]:
        layout_of(bundle.manifest)
        row = bundle.manifest.adapter(name).row or 0
        return bundle.manifest, bundle.bank()[row : row + 1].copy()

    manifest, row = read_bundle(path, read)
    form = ort.AdapterFormat()
    form.set_adapter_version(_VERSION)
    form.set_model_version(model_version(manifest))
    form.set_parameters({_BANK: ort.OrtValue.ortvalue_from_numpy(row)})  # no copy: row has to stay
    with output_file(Path(file)) as scratch:
        try:
            form.export_adapter(str(scratch))
        except RuntimeError as error:  # it does not say what the file system did, who tells us
            write_bytes(scratch, row.tobytes())
            raise WriteError(
                f"Could not write {file}: ONNX Runtime wrote none of it, or a part "
                f"({first_line(error)}). Nothing that was there before was changed."
            ) from error


def unpack_adapter(path: str | Path, file: str | Path) -> Adapter:
    """The adapter whose row an ``.onnx_adapter`` file holds.

    A row has matrices, not what they were made of: they come back as a diagonal and a product of
    low rank, with the same row (float32 of 1 + x less 1 where the form is sequential). Names of
    classes and preprocessing are in no row; see `save_adapter` for what is to be written.

    Args:
        path: a bundle of the rows' layout.
        file: that `pack_adapter` wrote.

    Raises:
        AdapterError: no such file, one of another layout or model, or a row that has no adapter.
        PlanError: the bundle's adapters are in its graph.
    """
    ort = require("onnxruntime", "cpu", _USE)
    manifest = read_bundle(path, lambda bundle: bundle.manifest)
    layout = layout_of(manifest)
    try:
        open_plain(Path(file)).close()  # ONNX Runtime would wait for a pipe
        form = ort.AdapterFormat.read_adapter(str(file))
        row = form.get_parameters()[_BANK].numpy().copy()
    except Exception as error:  # its exceptions have no base of their own
        raise AdapterError(
            f"{file} cannot be read as ONNX Runtime's adapter format with {_BANK}: "
            f"{_instead(Path(file), error)}. Pack the adapter again, or copy the file again."
        ) from error
    if form.get_model_version() != model_version(manifest) or row.shape != (1, layout.size):
        raise AdapterError(
            f"{file} holds rows {list(row.shape)} of model version {form.get_model_version()}; the "
            f"bundle {path} has [1, {layout.size}] and {model_version(manifest)}: another model or "
            "layout. Take the bundle that it was packed from."
        )
    return adapter_of(manifest, layout, row[0], str(file))


def _instead(file: Path, error: Exception) -> str:
    """What lies there in the place of such a file; ONNX Runtime says lines, of its own source."""
    try:
        return what_instead(file) or " ".join(str(error).split()).rpartition(") ")[2].rstrip(" .")
    except OSError as reason:
        return reason.strerror or str(reason)


def layout_of(manifest: Manifest) -> RowLayout:
    """The layout of a bundle's rows. Raises `PlanError` where its graph takes no bank."""
    if manifest.layout is None or manifest.bank_as_constant:
        raise PlanError(
            "the adapters of this bundle are in its graph, which takes no rows. Export side "
            "branches without `bank_as_constant=True`."
        )
    return manifest.layout


def model_version(manifest: Manifest) -> int:
    """31 bits of what a row's numbers mean: the frozen weights, and the layout."""
    facts, layout = manifest.backbone, layout_of(manifest).known()
    # As it was before there was a digest of buffers, where there are none.
    buffers = [facts.buffers] if facts.buffers not in ("", NO_BUFFERS) else []
    meaning = json.dumps([facts.sha256, *buffers, layout.to_json()], sort_keys=True)
    return int(hashlib.sha256(meaning.encode()).hexdigest()[:8], 16) >> 1


def adapter_of(
    manifest: Manifest, layout: RowLayout, row: NDArray[np.float32], source: str
) -> Adapter:
    """The adapter of a row [size]; see `unpack_adapter`."""
    parts = layout.views(row)
    form = _form_of(layout, parts, source)
    sites: dict[str, dict[str, NDArray[np.float32]]] = {}
    for branch in layout.branches:
        for index, site in enumerate(branch.sites):
            found = _extras(branch, index, parts)
            if branch.form == form:
                found |= _matrix(branch, index, parts)
            if found:
                sites.setdefault(site, {}).update(found)
    head = _head(manifest, parts)
    if not sites and head is None:
        raise AdapterError(f"{source}: its row is zeros: the bare backbone, and no adapter.")
    facts = manifest.backbone
    config = AdapterConfig(
        base_model=facts.model,
        form=form,
        target_modules=tuple(sites),
        base_model_args=facts.args,
        base_sha256=facts.sha256,
        base_buffers=facts.buffers or None,
        num_classes=None if head is None else len(head.bias),
    )
    return Adapter(config, {n: SiteTensors(**t) for n, t in sites.items()}, head, source)


def _form_of(layout: RowLayout, parts: Mapping[str, NDArray[np.float32]], source: str) -> Form:
    """The form of the branches that hold a matrix."""
    forms: list[Form] = sorted({b.form for b in layout.branches if _has_matrix(b, parts)})
    if len(forms) > 1:
        raise AdapterError(
            f"{source}: its row has additive and sequential matrices, and an adapter has one form."
        )
    return forms[0] if forms else "additive"


def _has_matrix(branch: Branch, parts: Mapping[str, NDArray[np.float32]]) -> bool:
    diag, right, left = (parts[f"{branch.name}/{part}"] for part in ("diag", "right", "left_t"))
    return bool(diag.any() or (right.any() and left.any()))


def _matrix(
    branch: Branch, index: int, parts: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """The tensors of a site's matrix, by name; none where it is zeros."""
    diag, right, left = (
        parts[f"{branch.name}/{part}"][index] for part in ("diag", "right", "left_t")
    )
    used = right.any(axis=1) & left.any(axis=1)
    found: dict[str, NDArray[np.float32]] = {}
    if used.any():
        found |= {"lora_A": right[used].copy(), "lora_B": left[used].T.copy()}
    if diag.any() or (found and branch.form == "sequential"):
        whole = diag + np.float32(1) if branch.form == "sequential" else diag.copy()
        zeros = (np.zeros(size, np.float32) for size in (branch.out, branch.in_))
        found |= dict(zip(("u", "v"), zeros, strict=True)) | {"d": whole}
    return found


def _extras(
    branch: Branch, index: int, parts: Mapping[str, NDArray[np.float32]]
) -> dict[str, NDArray[np.float32]]:
    """s_in, s_out and db of a site, those that do something."""
    found: dict[str, NDArray[np.float32]] = {}
    for part in branch.extras:
        values = parts[f"{branch.name}/{part}"][0 if part == "s_in" else index]
        if values.any():
            found[part] = values.copy() if part == "db" else values + np.float32(1)
    return found


def _head(manifest: Manifest, parts: Mapping[str, NDArray[np.float32]]) -> Head | None:
    if "head.own" not in parts or not parts["head.own"][0]:
        return None
    bias = parts["head.bias"]
    classes = int(np.count_nonzero(np.isfinite(bias)))
    weight = parts["head.weight"][:classes].copy()
    return Head(manifest.backbone.classifier, weight, bias[:classes].copy())
