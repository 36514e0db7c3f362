"""What follows an export's graphs: they are verified, and what is not good is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hhdeploy.bundle import Bundle
from hhdeploy.bundle.locking import Progress
from hhdeploy.bundle.manifest import PARITY_FILE, REFERENCE_FILE, Manifest, write_manifest
from hhdeploy.choices import Precision, TypedPrecision
from hhdeploy.errors import ParityError
from hhdeploy.files.writing import sha256_of, write_json
from hhdeploy.parity import ParityReport
from hhdeploy.verifying.answers import parity_error, verify_graphs
from hhdeploy.verifying.pictures import check_pictures
from hhdeploy.verifying.survival import Effects, say

if TYPE_CHECKING:
    from hhdeploy.verifying.reference import VerifyData


def verified(
    bundle: Bundle,
    data: VerifyData,
    precisions: Sequence[TypedPrecision],
    refuse: bool,
    progress: Progress,
) -> tuple[Manifest, ParityReport]:
    """The manifest of what is good, with its report on disk, and all that was found.

    Raises:
        ParityError: it is not good without the graphs that overflow.
        PlanError: an adapter moves nothing, and that is refused.
    """
    from hhdeploy.verifying.reference import Reference

    effects, reference = Effects.of_reference(bundle), Reference(*bundle.reference())
    found = verify_graphs(bundle, "cpu", None, reference, data, also=effects.measure)
    good = found.without(found.overflowed)
    if not good.passed:
        raise parity_error(found)
    kept = [p for p in precisions if p not in found.overflowed]
    say(progress, effects.lines(kept, refuse=refuse))
    pictures = check_pictures(bundle, added_later=True)
    good, found = replace(good, pictures=pictures), replace(found, pictures=pictures)
    return _store_report(_without_graphs(bundle, found.overflowed), good), found


def _without_graphs(bundle: Bundle, precisions: Sequence[Precision]) -> Bundle:
    """A new bundle, some graphs of it deleted."""
    manifest = bundle.manifest
    gone = {f for p in precisions for f in (manifest.graphs[p], f"{manifest.graphs[p]}.data")}
    for name in gone:
        (bundle.path / name).unlink(missing_ok=True)
    graphs = {p: name for p, name in manifest.graphs.items() if p not in precisions}
    files = {name: digest for name, digest in manifest.files.items() if name not in gone}
    return Bundle(bundle.path, replace(manifest, graphs=graphs, files=files))


def overflow_error(out: Path, report: ParityReport) -> ParityError:
    """Of a bundle that is there without the graphs that overflow: which, and what it has."""
    kept = ", ".join(dict.fromkeys(s.precision for s in report.without(report.overflowed).stages))
    return ParityError(
        f"{' and '.join(report.overflowed)} cannot hold the values of this model:\n"
        f"{report.explain_failures()}\n{out} was written without it and is good: it has {kept}, "
        "verified."
    )


def _store_report(bundle: Bundle, report: ParityReport) -> Manifest:
    """Write the report of a new bundle, and mark its adapters verified."""
    write_json(bundle.path / PARITY_FILE, report.to_json())
    adapters = tuple(replace(a, verified=True) for a in bundle.manifest.adapters)
    files = dict(bundle.manifest.files)
    for name in (PARITY_FILE, REFERENCE_FILE):
        files[name] = sha256_of(bundle.path / name)
    manifest = replace(bundle.manifest, adapters=adapters, files=files)
    write_manifest(bundle.path, manifest)
    return manifest
