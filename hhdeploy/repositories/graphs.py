"""What models of every server's repository are made of."""

from __future__ import annotations

from pathlib import Path

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST
from hhdeploy.bundle.store import Progress
from hhdeploy.choices import Precision
from hhdeploy.errors import BundleError, WriteError, as_code, require
from hhdeploy.exporters.triton import requestable

# Of the one version that is written.
VERSION = "1"


def open_servable(path: str | Path, out: Path, server: str) -> Bundle:
    """A bundle that a server of models can serve, and a place for its repository.

    Raises:
        BundleError: no bundle, or one without an adapter.
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
    if (out / MANIFEST).is_file():
        raise WriteError(f"{out} is a bundle. Choose another directory for the repository.")
    return bundle


def write_graph(
    bundle: Bundle, precision: Precision, target: Path, server: str, progress: Progress
) -> None:
    """A bundle's graph with the bank as it is now in it, its weights beside it in NAME.data.

    Raises:
        BundleError: no such graph, or a damaged file.
        MissingDependencyError: the ``export`` extra is not installed.
    """
    purpose = f"writing the {precision} graph for {server}"
    require("onnx", "export", purpose)
    ir = require("onnx_ir", "export", purpose)
    from hhdeploy.exporters.bake import baked
    from hhdeploy.exporters.writer import save_graph

    progress(f"writing the {precision} graph")
    manifest = bundle.manifest
    model = ir.load(bundle.graph(precision))
    if manifest.layout is not None and not manifest.bank_as_constant:
        model = baked(model, bundle.bank())
    save_graph(model, target)
