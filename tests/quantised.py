"""A quantised bundle that no test has to calibrate."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import hash_files, write_manifest
from tests.workshop import ROOT, copy_bundle

# As an earlier version wrote it, without the graphs that take pictures. Read only.
INT8 = ROOT / "tests" / "witnesses" / "v1" / "int8"


def int8_with_pictures(folder: Path) -> Path:
    """A copy of it with these graphs."""
    from hhdeploy.exporters.portable.pictures import write_picture_graphs

    path = copy_bundle(INT8, folder)
    manifest = Bundle.open(path).manifest
    write_picture_graphs(path, manifest.input_size[0])
    write_manifest(path, replace(manifest, files=hash_files(path)))
    return path
