"""What models of every server's repository are made of."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST, Manifest
from hhdeploy.bundle.store import Progress
from hhdeploy.choices import Precision
from hhdeploy.errors import BundleError, WriteError, as_code, first_line, require
from hhdeploy.exporters.triton import requestable
from hhdeploy.runtime.backends import check_tensors

if TYPE_CHECKING:
    import onnx_ir as ir

# Of the one version that is written.
VERSION = "1"


@dataclass(frozen=True)
class ServedModel:
    """What was written.

    Attributes:
        repository: the directory that the server is given.
        name: of the model.
        files: relative to the repository.
        rows: name -> row (``adapter_ids``), None in a folded bundle.
        input_size: (3, H, W) of ``images``.
        unverified: adapters that were never compared with the training-time model.
    """

    repository: Path
    name: str
    files: tuple[str, ...]
    rows: dict[str, int | None]
    input_size: tuple[int, int, int]
    unverified: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """For machines; ``adapters`` are the rows."""
        return {
            "repository": str(self.repository),
            "model": self.name,
            "files": list(self.files),
            "adapters": self.rows,
            "unverified": list(self.unverified),
        }


def served_facts(manifest: Manifest) -> dict[str, Any]:
    """What `ServedModel` says of a bundle."""
    return {
        "rows": {entry.name: entry.row for entry in requestable(manifest)},
        "input_size": manifest.input_size,
        "unverified": tuple(a.name for a in manifest.adapters if not a.verified),
    }


def open_servable(path: str | Path, out: Path, server: str) -> Bundle:
    """A bundle that a server of models can serve, and a place for its repository.

    Raises:
        BundleError: no bundle, one without an adapter, or one whose bank has other rows than it
            says: clients would ask for them.
        PlanError: it gives more than logits.
        WriteError: ``out`` is a bundle.
    """
    bundle = Bundle.open(path)
    bundle.manifest.check_logits_alone(f"a repository of {server}")
    if not requestable(bundle.manifest):
        raise BundleError(
            f"{bundle.path} has no adapter to serve. Add one with: "
            f"{as_code('add_adapter', bundle.path, 'NAME', 'DIR')}"
        )
    if os.path.isfile(out / MANIFEST):
        raise WriteError(f"{out} is a bundle. Choose another directory for the repository.")
    if bundle.manifest.layout is not None:
        bundle.bank()  # compared with what the adapters are said to have, also where it is baked in
    return bundle


def checked_graph(bundle: Bundle, precision: Precision, purpose: str) -> ir.Model:
    """A bundle's graph, which takes and gives what the manifest tells: clients go by that.

    Raises:
        BundleError: no such graph, a damaged file, or one that is no ONNX, or that takes or gives
            others than the manifest tells.
        MissingDependencyError: the ``export`` extra is not installed, which ``purpose`` needs.
    """
    require("onnx", "export", purpose)
    require("onnx_ir", "export", purpose)
    from hhdeploy.graph import open_graph

    path = bundle.graph(precision)
    try:
        model = open_graph(path)
    except Exception as error:  # of protobuf and of onnx-ir, which have no base of their own
        raise BundleError(
            f"{path}: expected a graph of ONNX, found none that can be read: {first_line(error)}. "
            "Copy or export the bundle again."
        ) from error
    takes, gives = (
        {str(v.name): [n if isinstance(n, int) else n.value for n in v.shape or ()] for v in values}
        for values in (model.graph.inputs, model.graph.outputs)
    )
    check_tensors(path, takes, gives, bundle.manifest)
    return model


def write_graph(
    bundle: Bundle, precision: Precision, target: Path, server: str, progress: Progress
) -> None:
    """A bundle's graph with the bank as it is now in it, its weights beside it in NAME.data.

    Raises:
        BundleError, MissingDependencyError: see `checked_graph`.
    """
    progress(f"writing the {precision} graph")
    model = checked_graph(bundle, precision, f"writing the {precision} graph for {server}")
    from hhdeploy.exporters.bake import baked
    from hhdeploy.exporters.portable.form import ADAPTERS_KEY, fixed_adapters
    from hhdeploy.exporters.writer import save_graph

    manifest = bundle.manifest
    if manifest.layout is not None and not manifest.bank_as_constant:
        model = baked(model, bundle.bank())
        model.metadata_props[ADAPTERS_KEY] = fixed_adapters(manifest)
    save_graph(model, target)
