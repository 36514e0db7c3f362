"""The rounding twin of a typed graph: what shows on a CPU that the graph is right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import BANK_FILE
from hhdeploy.choices import TypedPrecision
from hhdeploy.errors import require
from hhdeploy.files.writing import sha256_of, temporary_directory


@contextlib.contextmanager
def twin_of(bundle: Bundle, precision: TypedPrecision | None) -> Iterator[Bundle | None]:
    """A bundle whose float32 graph is the rounding twin of a typed graph; its files are there until
    the end of the block. None of None: nothing is written.

    Raises:
        WriteError: the directory of temporary files takes it not.
    """
    if precision is None:
        yield None
        return
    with temporary_directory("twin") as path:
        yield _twin_in(path, bundle, precision)


def _twin_in(path: Path, bundle: Bundle, precision: TypedPrecision) -> Bundle:
    for package in ("onnx", "onnx_ir"):
        require(package, "export", f"verifying a {precision} graph (by its rounding twin)")
    from hhdeploy.exporters.precision.typed import rounding_twin
    from hhdeploy.exporters.writer import save_graph
    from hhdeploy.graph import open_graph

    twin = rounding_twin(open_graph(bundle.graph(precision)))
    save_graph(twin, path / "twin.onnx")
    files = {name: sha256_of(path / name) for name in ("twin.onnx", "twin.onnx.data")}
    held = {}
    if bundle.manifest.layout is not None:
        name = bundle.manifest.named(BANK_FILE)
        held[name], files[name] = bundle.read(name), bundle.manifest.files[name]
    manifest = replace(bundle.manifest, graphs={"float32": "twin.onnx"}, files=files)
    return Bundle(path, manifest, held)
