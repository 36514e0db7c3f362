"""Compiled OpenVINO models, kept on disk for the next start.

A cache is only speed: a blob that is damaged is compiled again, one that cannot be written is
left out, with a warning. The key holds the hashes of graph and weights and all that compiling
depends on, so a changed graph, another version or another processor never meets an old blob. Where
blobs are, and which of them go when there are many: `hhdeploy.files.caches`.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hhdeploy.files.caches import Entry, entry_at, key_of

# The checksum is behind the blob, which stays aligned in memory. CRC-32, not SHA-256: it is
# against torn files, and half the time of opening would go into hashing the weights again.
_CHECKSUM = 4


def blob_entry(root: Path, *facts: str) -> Entry:
    """The place of the blob that depends on ``facts`` and on nothing else."""
    return entry_at(root, "openvino", f"{key_of(*facts)}.blob")


def map_blob(entry: Entry) -> NDArray[np.uint8] | None:
    """What `write_blob` stored, mapped and private to this process; None if it is not whole."""
    try:
        return entry.read(_mapped)
    except (OSError, ValueError):
        return None


def write_blob(entry: Entry, blob: memoryview) -> None:
    """Store a blob, as `Entry.keep`."""

    def make(file: Path) -> None:
        with file.open("wb") as stream:
            stream.write(blob)
            stream.write(_checksum(blob))

    entry.keep(make)


def _mapped(file: Path) -> NDArray[np.uint8]:
    """Raises `OSError`; `ValueError`: an empty file, or not what was stored."""
    # Copy on write: OpenVINO takes writeable memory only, the file is never changed.
    stored = np.memmap(file, np.uint8, mode="c")
    blob, checksum = stored[:-_CHECKSUM], stored[-_CHECKSUM:]
    if _checksum(blob.data) != checksum.tobytes():
        raise ValueError(f"{file} is not what was stored")
    return blob


def _checksum(blob: memoryview) -> bytes:
    return zlib.crc32(blob).to_bytes(_CHECKSUM, "big")
