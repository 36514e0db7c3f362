"""Compiled OpenVINO models, kept on disk for the next start.

A cache is only speed: a blob that is damaged is compiled again, one that cannot be written is
left out. The key holds the hashes of graph and weights and all that compiling depends on, so a
changed graph, another version or another processor never meets an old blob.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import WriteError
from hhdeploy.files import atomic_file, os_errors

# The checksum is behind the blob, which stays aligned in memory. CRC-32, not SHA-256: it is
# against torn files, and half the time of opening would go into hashing the weights again.
_CHECKSUM = 4
# Of all blobs together; a large ViT takes 1.2 GB.
LIMIT = 4 << 30


def blob_file(root: Path, *facts: str) -> Path:
    """Where the blob is that depends on ``facts`` and on nothing else."""
    key = hashlib.sha256("\n".join(facts).encode()).hexdigest()
    return root / "openvino" / f"{key[:32]}.blob"


def map_blob(file: Path) -> NDArray[np.uint8] | None:
    """What `write_blob` stored, mapped and private to this process; None if it is not whole."""
    try:
        # Copy on write: OpenVINO takes writeable memory only, the file is never changed.
        stored = np.memmap(file, np.uint8, mode="c")
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    blob, checksum = stored[:-_CHECKSUM], stored[-_CHECKSUM:]
    if _checksum(blob.data) != checksum.tobytes():
        return None
    with suppress(OSError):
        os.utime(file)  # used last when the oldest have to go
    return blob


def write_blob(file: Path, blob: memoryview, limit: int = LIMIT) -> None:
    """Store a blob, atomically, and make room: blobs used longest ago go, up to ``limit`` bytes.

    One that is larger than ``limit`` is not stored.
    """
    if len(blob) > limit:
        return
    with suppress(WriteError), os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        _make_room(file.parent, limit - len(blob))
        with atomic_file(file) as scratch, scratch.open("wb") as stream:
            stream.write(blob)
            stream.write(_checksum(blob))


def _checksum(blob: memoryview) -> bytes:
    return zlib.crc32(blob).to_bytes(_CHECKSUM, "big")


def _make_room(folder: Path, room: int) -> None:
    """Remove the blobs used longest ago until the others take at most ``room`` bytes."""
    found = [(blob.stat(), blob) for blob in folder.glob("*.blob")]
    for facts, blob in sorted(found, key=lambda pair: pair[0].st_mtime, reverse=True):
        room -= facts.st_size
        if room < 0:
            blob.unlink(missing_ok=True)  # processes that have it open keep it
