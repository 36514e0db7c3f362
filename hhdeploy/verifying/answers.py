"""What a bundle's graphs answer, and how far that is from what they should."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.checks import BACKBONE
from hhdeploy.adapters.config import VALUES
from hhdeploy.backbones.facts import LOGITS
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.manifest import MANIFEST, PARITY_FILE, Manifest
from hhdeploy.choices import BACKENDS, TYPED, Device, Precision, Runner, member
from hhdeploy.errors import BundleError, ParityError, as_code
from hhdeploy.parity import Comparison, ParityReport, StageResult, compare, stage_of
from hhdeploy.verifying.overflow import find_overflow
from hhdeploy.verifying.twins import twin_of

if TYPE_CHECKING:
    from hhdeploy.verifying.reference import Reference, VerifyData

# Given every graph while it can be run: a bundle, the precision to open it in (of a rounding twin
# float32), and the precision that it shows.
Also = Callable[[Bundle, Precision, Precision], None]
# Graphs that need no calibration data.
_UNCALIBRATED: tuple[Precision, ...] = ("float32", *TYPED)
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


def unmeasured(shown: Bundle, run: Precision, precision: Precision) -> None:
    """`Also` of those who ask no more of a graph than its answers."""


def verify_graphs(
    bundle: Bundle,
    device: Device,
    precisions: Sequence[Precision] | None,
    reference: Reference | None = None,
    data: VerifyData | None = None,
    *,
    also: Also = unmeasured,
) -> ParityReport:
    """Run every graph on the reference's images, in batches that mix adapters.

    Args:
        bundle: whose graphs.
        device: that runs them.
        precisions: of the graphs, None: all that the device and the images can show.
        reference: what they should answer, adapters added later included; None: the bundle's own.
        data: where its images are from, None: what the bundle's report says.
        also: given every graph beside.

    Raises:
        BundleError: the reference lacks an adapter or tells other classes, or the device no engine.
    """
    right = _right_answers(bundle, reference)
    described: Mapping[str, Any] = {}
    if data is not None:
        described = data.to_json()
    elif bundle.manifest.has(PARITY_FILE):
        described = bundle.parity()["data"]
    noise = described.get("kind") == "noise"
    stages: list[StageResult] = []
    for precision in precisions or _default_precisions(bundle, device, noise=noise):
        stages += _stages(
            bundle, runner_of(bundle.manifest, device, precision), precision, right, also
        )
    return ParityReport(described, stages)


@dataclass(frozen=True, eq=False)
class _Right:
    """What every graph should answer.

    Attributes:
        names: adapter -> row.
        images: float32 [n, 3, H, W].
        ids: int64 [n], their rows.
        logits: float64 [n, ...] of the training-time model.
    """

    names: Mapping[str, int]
    images: NDArray[np.float32]
    ids: NDArray[np.int64]
    logits: NDArray[np.float64]


def _right_answers(bundle: Bundle, reference: Reference | None) -> _Right:
    """Of all adapters that the reference covers, without those that are not in the bundle."""
    if reference is None:
        images, ids, logits = bundle.reference()
    else:
        images, ids, logits = reference.images, reference.adapter_ids, reference.logits
    names = rows_covered(bundle.manifest, added_later=reference is not None)
    # Rows of adapters that were removed since, or replaced by one that is not in the reference.
    known = np.isin(ids, list(names.values()))
    images, ids, logits = images[known], ids[known], logits[known]
    if not len(images):
        raise BundleError(
            f"{bundle.path}: nothing to verify: none of its adapters is in the reference. Run: "
            f"{as_code('verify_against_torch', bundle.path)}"
        )
    if absent := [name for name, row in names.items() if row not in ids]:
        raise BundleError(
            f"{bundle.path}: {', '.join(absent)}: expected images of it in the reference, as it "
            "counts as verified, found none. Run: "
            f"{as_code('verify_against_torch', bundle.path)}"
        )
    for name, row in names.items():
        check_columns(bundle, name, logits[ids == row])
    return _Right(names, images, ids, logits)


def _stages(
    bundle: Bundle, runner: Runner, precision: Precision, right: _Right, also: Also
) -> Iterator[StageResult]:
    """One graph, or its rounding twin, judged for every adapter and output."""
    manifest = bundle.manifest
    stage = stage_of(manifest.kind, runner, precision)
    low = member(TYPED, precision) if stage == "twin" else None
    with twin_of(bundle, low) as twin:
        shown, run = (bundle, precision) if twin is None else (twin, "float32")
        found, runtime = logits_of(shown, runner, run, right.images, right.ids, right.names)
        also(shown, run, precision)
        for name, row in right.names.items():
            own = right.ids == row
            expected, ours = manifest.split(right.logits[own]), manifest.split(found[own])
            for output in expected:
                comparison = compared(manifest, name, output, expected, ours)
                overflow = ""
                if twin is not None and low is not None and not np.isfinite(comparison.max_abs):
                    overflow = find_overflow(twin, low, right.images[own], right.ids[own])
                judged = StageResult.of(stage, precision, runtime, name, comparison, overflow)
                yield replace(judged, output=output)


def _default_precisions(bundle: Bundle, device: Device, *, noise: bool) -> tuple[Precision, ...]:
    """All that the device can show: graphs, or engines. Graphs that came from calibration were
    judged on real images then; where these images are noise, far outside their ranges, they would
    prove nothing."""
    if device in BACKENDS:
        engines = [e for e in bundle.manifest.engines if e.backend == device]
        if not engines:
            raise BundleError(
                f"{bundle.path}: expected engines for {device} to compare, found none. Build one "
                f"with: {as_code('build', bundle.path, backend=device)}"
            )
        return tuple(dict.fromkeys(e.precision for e in engines))
    graphs = tuple(bundle.manifest.graphs)
    if device == "openvino":
        from hhdeploy.runtime.openvino_backend import computes_bfloat16

        graphs = tuple(p for p in graphs if p != "bfloat16" or computes_bfloat16())
    if noise:
        return tuple(p for p in graphs if p in _UNCALIBRATED)
    return graphs


def runner_of(manifest: Manifest, device: Device, precision: Precision) -> Runner:
    """What ``auto`` means here for a precision; another device is what it says."""
    if device != "auto":
        return device
    from hhdeploy.runtime.backends import find_target
    from hhdeploy.runtime.openvino_backend import computes_bfloat16

    found = find_target(manifest, device, precision).device
    if found == "openvino" and precision == "bfloat16" and not computes_bfloat16():
        return "cpu"  # no session computes it here; its graph is shown by its rounding twin
    return found


def parity_error(report: ParityReport) -> ParityError:
    """What failed, in words; a type's overflow is no fault to report, nor are values on noise."""
    failed = [s for s in report.stages if s.failures]
    advice = " Please report this with the name of the model."
    if all(s.overflow for s in failed):
        advice = ""
    elif report.data.get("kind") == "noise" and all(map(_rounded_values, failed)):
        advice = (
            " The values of a regression hardly differ on noise, and rounding is much of what they "
            "differ by. Compare them on images of its own: `export()` it with these as "
            "`verify_data`."
        )
    return ParityError(
        "the outputs differ from the training-time model by more than the parity table allows:\n"
        f"{report.explain_failures()}\nNo bundle was written or changed.{advice}"
    )


def _rounded_values(stage: StageResult) -> bool:
    """Whether a regression's values in 16 bits are numbers, if not the right ones."""
    figures = stage.comparison
    values = stage.output == LOGITS and figures.cosine is None and math.isfinite(figures.max_abs)
    return values and stage.precision in TYPED
