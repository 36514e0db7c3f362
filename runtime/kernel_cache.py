"""Kernels that TensorRT-RTX compiled on this machine, kept for the next start.

A cache is only speed: one that is damaged or belongs to another driver is compiled again, one
that cannot be written is left out, with a warning.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from hhdeploy.files.caches import Entry, entry_at, key_of

_DIGEST = hashlib.sha256().digest_size


def kernels_entry(root: Path, engine_sha256: str, version: str, gpu: str) -> Entry:
    """The place of one engine's kernels, for one version of TensorRT-RTX and one GPU."""
    return entry_at(root, "kernels", f"{key_of(engine_sha256, version, gpu)}.bin")


def read_kernels(entry: Entry) -> bytes | None:
    """What `write_kernels` stored, None if that is not there to the byte.

    TensorRT-RTX checks versions and the GPU itself; the digest keeps torn files from it.
    """
    try:
        return entry.read(_checked)
    except (OSError, ValueError):
        return None


def write_kernels(entry: Entry, blob: bytes) -> None:
    """Store kernels; processes that share them see the old or the new ones, whole."""
    entry.keep(lambda file: file.write_bytes(hashlib.sha256(blob).digest() + blob))


def _checked(file: Path) -> bytes:
    stored = file.read_bytes()
    digest, blob = stored[:_DIGEST], stored[_DIGEST:]
    if hashlib.sha256(blob).digest() != digest:
        raise ValueError(f"{file} is not what was stored")
    return blob
