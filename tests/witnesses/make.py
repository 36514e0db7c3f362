"""Write the witnesses of a bundle format: ``python -m tests.witnesses.make NAME``.

Run once, by the version whose format they witness; the files are committed and never made again.
``v1`` was written by the last version that changed bundles in place, without a lock and without
digits of the content in file names. ``v2`` is the second schema of rows and adapters: s_in, s_out
and db, and values of whole parameters.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.files.tensors import write_tensors
from hhdeploy.quantising import CalibrationOptions, calibrate_bundle
from hhdeploy.runtime import open_session
from tests.support import images
from tests.workshop import (
    Workshop,
    copy_bundle,
    make_scaled_adapters,
    make_workshop,
    other_workshop,
)

HERE = Path(__file__).parent
IMAGES = 3


def main(name: str) -> None:
    """Make a format's bundles, what they were exported from, and their logits."""
    out = HERE / name
    out.mkdir()
    with tempfile.TemporaryDirectory() as folder:
        workshop = make_workshop(Path(folder))
        shutil.copy(workshop.checkpoint, out / "backbone.safetensors")
        if name == "v1":
            shutil.copytree(workshop.directory("rival"), out / "rival")
        for bundle in {"v1": _bundles, "v2": _scaled}[name](workshop, out):
            _record(bundle, out / f"{bundle.name}.safetensors")


def _scaled(workshop: Workshop, out: Path) -> list[Path]:
    adapters = make_scaled_adapters(workshop)
    scaled = other_workshop(workshop.root / "scaled", workshop, adapters)
    names = ("scaled", "ia3", "after", "plain")
    branches = scaled.export(out / "scaled", names).path
    return [branches, scaled.export(out / "values", ("norms",), fold=True).path]


def _bundles(workshop: Workshop, out: Path) -> list[Path]:
    folded = workshop.export(out / "folded", ("alpha",), fold=True).path
    branches = workshop.export(out / "branches", ("alpha", "gamma")).path
    added = copy_bundle(branches, out / "added")
    add_adapter(added, "rival", workshop.directory("rival"))
    int8 = copy_bundle(branches, out / "int8")
    pictures = workshop.root / "pictures"
    for number, adapter in enumerate(("alpha", "gamma")):
        _write_pictures(pictures / adapter / "a", 12, number)
    calibrate_bundle(
        int8, pictures, CalibrationSettings(images=16), CalibrationOptions(cache=None, threads=1)
    )
    return [folded, branches, added, int8]


def _write_pictures(folder: Path, count: int, seed: int) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for index in range(count):
        coarse = rng.integers(0, 256, (5, 7, 3), np.uint8)
        Image.fromarray(coarse).resize((41, 37)).save(folder / f"{index}.png")


def _record(bundle: Path, file: Path) -> None:
    """Images, and the logits of every graph for every adapter, as ``PRECISION/ADAPTER``."""
    manifest = Bundle.open(bundle).manifest
    inputs = images(IMAGES)
    tensors = {"images": inputs}
    for precision in manifest.graphs:
        with open_session(bundle, device="cpu", precision=precision, threads=1) as session:
            for adapter in manifest.adapters:
                names = None if manifest.kind == "folded" else adapter.name
                tensors[f"{precision}/{adapter.name}"] = session.run(inputs, names)
    write_tensors(file, tensors, {"versions": json.dumps(dict(manifest.versions))})


if __name__ == "__main__":
    main(sys.argv[1])
