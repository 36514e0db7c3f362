"""Engines of a bundle: what the manifest says of them, and which one a machine may load.

Needs no TensorRT: an engine that does not fit is refused before anything deserialises it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from hhdeploy.bundle.manifest import BANK_FILE, EngineEntry, Manifest, Range
from hhdeploy.choices import Precision, TensorRt
from hhdeploy.errors import BundleError, SessionError, as_code


def engine_name(
    precision: Precision,
    backend: TensorRt,
    architectures: Sequence[str],
    *,
    bank_as_constant: bool = False,
) -> str:
    """``model.float16.tensorrt-rtx.sm89.engine``; several architectures are joined by ``+``."""
    where = "+".join(architectures) or "portable"
    bank = ".constant-bank" if bank_as_constant else ""
    return f"model.{precision}.{backend}.{where}{bank}.engine"


def choose_engine(
    manifest: Manifest, backend: TensorRt, precision: Precision, *, version: str, architecture: str
) -> EngineEntry:
    """The engine that this machine may load, before it is read from disk.

    An engine made for just this architecture is preferred to one for several, that to a
    portable one, and one that takes the bank as input to one that has it baked in.

    Args:
        manifest: of the bundle.
        backend: whose engine.
        precision: of the engine.
        version: of the backend that is installed here.
        architecture: of the GPU that is here, e.g. ``sm89``.

    Raises:
        BundleError: none was built for this backend and precision, or the one that was is stale
            (another graph or bank), of another version, or of another architecture.
    """
    entries = [e for e in manifest.engines if (e.backend, e.precision) == (backend, precision)]
    command = as_code("build", "BUNDLE", backend=backend, precision=precision)
    if not entries:
        there = ", ".join(f"{e.backend} {e.precision}" for e in manifest.engines) or "none"
        raise BundleError(
            f"the bundle has no {precision} engine for {backend}; it has: {there}. "
            f"Build it with: {command}"
        )
    reasons = {e.file: _unfit(manifest, e, version, architecture) for e in entries}
    fit = [e for e in entries if reasons[e.file] is None]
    if not fit:
        listed = "\n".join(f"  {name}: {reason}" for name, reason in reasons.items())
        raise BundleError(f"no engine fits this machine:\n{listed}\nBuild one with: {command}")
    return min(fit, key=lambda e: (e.bank_sha256 is not None, len(e.architectures) or 1_000))


def stale(manifest: Manifest, entry: EngineEntry) -> str | None:
    """Why an engine is not the bundle's any more, or None."""
    if manifest.graph_digest(entry.precision) != entry.graph_sha256:
        return "it was built from another graph than the bundle has now"
    if entry.bank_sha256 not in (None, manifest.files.get(manifest.named(BANK_FILE))):
        return "the bank baked into it is not the one that the bundle has now"
    return None


def _unfit(manifest: Manifest, entry: EngineEntry, version: str, architecture: str) -> str | None:
    """Why an engine cannot be loaded here, or None."""
    if reason := stale(manifest, entry):
        return reason
    if entry.version != version:
        return f"built with {entry.backend} {entry.version}, installed is {version}"
    if entry.architectures and architecture not in entry.architectures:
        return f"built for {', '.join(entry.architectures)}, this GPU is {architecture}"
    if not entry.architectures and not _portable(entry.backend, architecture):
        return f"a portable engine of {entry.backend} does not run on {architecture}"
    return None


def sm_number(architecture: str) -> int:
    """``sm89`` -> 89; 0 where there is no number."""
    return int(re.sub(r"\D", "", architecture) or 0)


def _portable(backend: TensorRt, architecture: str) -> bool:
    """Ampere and newer; TensorRT-RTX leaves out the data centre's Hopper and Blackwell."""
    number = sm_number(architecture)
    return number >= 80 and not (backend == "tensorrt-rtx" and number in (90, 100, 103))


def split_batch(images: int, batch: Range) -> list[tuple[int, int, int]]:
    """(start, stop, run size) of the runs that cover ``images`` with one optimization profile.

    A batch larger than the profile runs in pieces; one smaller than its minimum is padded up.

    >>> split_batch(70, (1, 8, 32))
    [(0, 32, 32), (32, 64, 32), (64, 70, 6)]
    >>> split_batch(3, (4, 8, 8))
    [(0, 3, 4)]
    """
    least, _, most = batch
    starts = range(0, images, most)
    pieces = [(start, min(start + most, images)) for start in starts]
    return [(start, stop, max(stop - start, least)) for start, stop in pieces]


def check_slots(rows: int, slots: Range | None) -> None:
    """The session's bank fits the engine's profile. Raises `SessionError`."""
    if slots is None or slots[0] <= rows <= slots[2]:
        return
    raise SessionError(
        f"`slots={rows}`: this engine takes banks of {slots[0]} to {slots[2]} rows. Open the "
        f"session with `slots={min(max(rows, slots[0]), slots[2])}`, or build with "
        f"`max_slots={rows}`."
    )
