"""Kernels that TensorRT-RTX compiled on this machine, kept for the next start.

A cache is only speed: one that is damaged or belongs to another driver is compiled again, one
that cannot be written is left out.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path

from hhdeploy.errors import WriteError
from hhdeploy.files import atomic_file, default_cache, os_errors

_DIGEST = hashlib.sha256().digest_size


def cache_file(engine_sha256: str, version: str, gpu: str) -> Path:
    """Where the kernels of one engine are, for one version of TensorRT-RTX and one GPU."""
    key = hashlib.sha256("\n".join((engine_sha256, version, gpu)).encode()).hexdigest()
    return default_cache() / "kernels" / f"{key[:32]}.bin"


def read_cache(file: Path) -> bytes | None:
    """What `write_cache` stored, None if that is not there to the byte.

    TensorRT-RTX checks versions and the GPU itself; the digest keeps torn files from it.
    """
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    digest, blob = stored[:_DIGEST], stored[_DIGEST:]
    return blob if hashlib.sha256(blob).digest() == digest else None


def write_cache(file: Path, blob: bytes) -> None:
    """Store kernels, atomically: processes that share the file see one or the other whole."""
    with suppress(WriteError), os_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(file) as scratch:
            scratch.write_bytes(hashlib.sha256(blob).digest() + blob)
