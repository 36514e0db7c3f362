"""What a bundle's graphs answer, and how far that is from what they should."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.config import VALUES
from hhdeploy.backbones.facts import LOGITS
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST, Manifest
from hhdeploy.choices import Device, Precision
from hhdeploy.errors import BundleError
from hhdeploy.parity import Comparison, compare

_BATCH = 8


def rows_covered(manifest: Manifest, *, added_later: bool) -> dict[str, int]:
    """Name -> row of what the reference covers: adapters added later only if it is new."""
    rows = {BACKBONE: 0} if manifest.answers_backbone else {}
    return rows | {a.name: a.row or 0 for a in manifest.adapters if a.verified or added_later}


def logits_of(
    bundle: Bundle,
    device: Device,
    precision: Precision,
    images: NDArray[np.float32],
    ids: NDArray[np.int64],
    names: Mapping[str, int],
) -> tuple[NDArray[np.float32], str]:
    """float32 logits [n, classes] of images [n, 3, H, W] of rows, and what computed them.

    ``names``: adapter -> row.
    """
    from hhdeploy.runtime.session import open_bundle

    by_row: dict[int, str | None] = {row: name for name, row in names.items()}
    with open_bundle(bundle, device=device, precision=precision) as session:
        batches = [
            session.answer(images[i : i + _BATCH], [by_row[int(r)] for r in ids[i : i + _BATCH]])
            for i in range(0, len(images), _BATCH)
        ]
        return np.concatenate(batches), session.device


def check_columns(bundle: Bundle, name: str, reference: NDArray[np.float64]) -> None:
    """Compare the classes that somebody has with a reference of them: of a manifest that says
    fewer, or more, an answer would be wrong without a word.

    With adapters' own heads a reference is -inf past the classes. Without, all have the classes
    that the reference has columns, and -inf is the model's own answer: a class that it rules out.

    Raises:
        BundleError: naming who, and both.
    """
    manifest = bundle.manifest
    if not manifest.classes:
        return
    logits = manifest.split(reference)[LOGITS]
    own = logits.shape[1]
    if manifest.layout is not None and manifest.layout.classes:
        there = ~np.isneginf(logits).all(axis=0)
        own = int(np.max(np.flatnonzero(there) + 1, initial=0))
    said = manifest.backbone_classes if name == BACKBONE else manifest.adapter(name).classes
    if said != own:
        raise BundleError(
            f"{bundle.path / MANIFEST}: {name}: expected {own} classes, as the reference has, "
            f"found {said}. Copy or export the bundle again."
        )


def compared(
    manifest: Manifest,
    name: str,
    output: str,
    right: Mapping[str, NDArray[Any]],
    ours: Mapping[str, NDArray[Any]],
) -> Comparison:
    """Logits as what they mean; features and tokens by their error over the range of all."""
    kind = manifest.problem_type(name) if output == LOGITS else VALUES
    count = len(right[output])
    return compare(right[output].reshape(count, -1), ours[output].reshape(count, -1), kind)
