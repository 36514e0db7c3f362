"""Logits that are answers and logits that are none, for all that tell the two apart."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from hhdeploy.adapters.config import CLASSES, LABELS, VALUES, ProblemType
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import ADAPTERS, BANK_FILE, write_manifest
from hhdeploy.files.tensors import tensor_bytes
from hhdeploy.files.writing import sha256_of
from tests.workshop import copy_bundle

NAN, INF = float("nan"), float("inf")
# Name of an adapter -> what its numbers mean, the numbers, and what it says: None, an error.
LOGITS: dict[str, tuple[ProblemType, list[float], list[str] | None]] = {
    "class-first-nan": (CLASSES, [NAN, 0, 1], None),
    "classes": (CLASSES, [0, 2, 1], ["1"]),
    "class-out": (CLASSES, [-INF, 1, 2], ["2"]),
    "class-nan": (CLASSES, [0, NAN, 1], None),
    "class-inf": (CLASSES, [0, 1, INF], None),
    "classes-nan": (CLASSES, [NAN] * 3, None),
    "classes-out": (CLASSES, [-INF] * 3, None),
    "labels": (LABELS, [1, 2, -1], ["1", "0"]),
    "label-out": (LABELS, [-INF, 2, -1], ["1"]),
    "label-nan": (LABELS, [1, NAN, 2], None),
    "label-inf": (LABELS, [1, INF, 2], None),
    "labels-out": (LABELS, [-INF] * 3, None),
    "values": (VALUES, [3, -1, 2], ["0", "1", "2"]),
    "value-nan": (VALUES, [3, NAN, 2], None),
    "value-inf": (VALUES, [3, INF, 2], None),
    "value-minus-inf": (VALUES, [3, -INF, 2], None),
}


def bundle_of_logits(source: Path, target: Path) -> Path:
    """A copy of a bundle whose adapters say `LOGITS`, whatever they are shown."""
    path = copy_bundle(source, target)
    bundle = Bundle.open(path)
    manifest, layout = bundle.manifest, bundle.manifest.layout
    assert layout is not None
    like = next(entry for entry in manifest.adapters if entry.classes == 3)
    assert like.row is not None
    row, rows, entries = bundle.bank()[like.row], [bundle.bank()[0]], []
    files = {n: d for n, d in manifest.files.items() if not n.startswith(f"{ADAPTERS}/")}
    for name, (kind, logits, _) in LOGITS.items():
        rows.append(row.copy())
        parts = layout.views(rows[-1])
        parts["head.weight"][:] = 0
        parts["head.bias"][:3] = logits
        own = {"name": name, "row": len(rows) - 1, "problem_type": kind, "class_names": None}
        entries.append(replace(like, **own))
        shutil.copytree(path / ADAPTERS / like.name, path / ADAPTERS / name)
        files |= {
            file.replace(f"/{like.name}/", f"/{name}/"): digest
            for file, digest in manifest.files.items()
            if file.startswith(f"{ADAPTERS}/{like.name}/")
        }
    bank = manifest.named(BANK_FILE)
    (path / bank).write_bytes(tensor_bytes({"adapter_bank": np.stack(rows)}))
    files[bank] = sha256_of(path / bank)
    write_manifest(path, replace(manifest, adapters=tuple(entries), files=files))
    return path
