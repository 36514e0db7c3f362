"""Signatures of whole bundles, as OpenSSF's model-signing writes them. Needs the extra ``sign``.

``model.sig`` signs every other file of the bundle, the manifest among them, by an elliptic-curve
key on disk. Nothing but the lock of a change may lie beside what was signed.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hhdeploy.bundle.locking import LOCK, locked, tidy
from hhdeploy.bundle.manifest import LOCK_TIMEOUT, MANIFEST, SIGNATURE
from hhdeploy.bundle.reading import Bundle
from hhdeploy.bundle.store import Progress, settled
from hhdeploy.choices import listener, text
from hhdeploy.errors import (
    BundleError,
    ConflictError,
    ReadError,
    WriteError,
    abbreviate,
    first_line,
    require,
)
from hhdeploy.files.plain import read_few, read_plain
from hhdeploy.files.writing import atomic_file, temporary_directory

_IGNORED = (SIGNATURE, LOCK)


def sign(
    path: str | Path,
    key: str | Path,
    *,
    password: str | None = None,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Path:
    """Sign a bundle whose files have the hashes of its manifest; an older signature is replaced.

    What the last change left for those who had opened the bundle before (``.old``) is removed. The
    next change removes the signature.

    Args:
        path: the bundle.
        key: an elliptic-curve private key (P-256, P-384 or P-521) in PEM.
        password: of the key, if it is encrypted.
        lock_timeout: see `hhdeploy.bundle.edit`.
        progress: see there.

    Returns:
        The signature's file.

    Raises:
        BundleError: a file is missing or damaged, or one that the manifest does not name is there.
        ReadError: a key that cannot be read, or of another kind.
        ConflictError, WriteError: see `hhdeploy.bundle.edit`.
        MissingDependencyError: model-signing is not installed.
    """
    progress = listener(progress)
    library = _library("signing a bundle")
    secret = text(password, "password", "it").encode() if password is not None else None
    config = library.signing.Config().set_hashing_config(_hashing(library))
    with _reading("key", key):
        _check_size(Path(key))
        config.use_elliptic_key_signer(private_key=Path(key), password=secret)
    with settled(path, lock_timeout=lock_timeout, progress=progress) as bundle:
        bundle.check_files()
        _check_strangers(bundle)
        with temporary_directory("signature") as scratch:
            config.sign(bundle.path, scratch / SIGNATURE)
            content = (scratch / SIGNATURE).read_bytes()
        with atomic_file(bundle.path / SIGNATURE, Path(path) / SIGNATURE) as target:
            target.write_bytes(content)
    return Path(path) / SIGNATURE


def check_signature(path: str | Path, public_key: str | Path) -> None:
    """Compare a bundle with its signature: every byte of every file, and that there is no other.

    What a killed command left in it is removed, if it can be, where that alone is wrong.

    Args:
        path: the bundle.
        public_key: of the key it was signed with, in PEM.

    Raises:
        BundleError: no signature, one of another key, or one of another content; the message
            names the files.
        ConflictError: another process is changing the bundle.
        ReadError: a key that cannot be read, or of another kind.
        MissingDependencyError: model-signing is not installed.
    """
    library = _library("comparing a bundle with its signature")
    root, config = Bundle.open(path).path, library.verifying.Config()
    with _reading("public_key", public_key):
        _check_size(Path(public_key))
        config.use_elliptic_key_verifier(public_key=Path(public_key))
    config.set_hashing_config(_hashing(library))
    try:
        _compare(root, config, public_key)
    except BundleError:
        if not _tidied(root):
            raise
        _compare(root, config, public_key)


def _compare(root: Path, config: Any, public_key: str | Path) -> None:
    """Raises `BundleError`, see `check_signature`; the library has errors of many kinds."""
    try:
        _check_form(read_plain(root / SIGNATURE))
        _check_kinds(root)
        config.verify(root, root / SIGNATURE)
    except FileNotFoundError:
        raise BundleError(
            f"{root} is not signed: {SIGNATURE} was expected in it. A change of a bundle removes "
            "its signature."
        ) from None
    except Exception as error:
        raise BundleError(
            f"{root} is not what was signed with the key of {public_key}: "
            f"{first_line(error)}. Get the bundle again from whoever signed it, or compare it "
            "with the right key."
        ) from error


def _tidied(root: Path) -> bool:
    """Remove what a killed command left, as the next change would: that is nobody's tampering.
    False where there was nothing, or nothing can be written, as on a medium that is only read.

    Raises:
        ConflictError: another process is changing the bundle.
    """
    real = Path(os.path.realpath(root))
    try:
        before = set(os.listdir(real))
        with locked(real):
            tidy(Bundle.open(real))
        # A lock that goes with it is no leftover: what somebody wrote into one is tampering.
        return set(os.listdir(real)) != before - {LOCK}
    except ConflictError:
        raise
    except (BundleError, WriteError, OSError):
        return False


def _library(purpose: str) -> Any:
    return require("model_signing", "sign", purpose)


def _hashing(library: Any) -> Any:
    """All files but signature and lock; a folder of Git is none of a bundle's."""
    return library.hashing.Config().set_ignored_paths(paths=_IGNORED, ignore_git_paths=False)


def _check_size(key: Path) -> None:
    """Raises `OSError` for a key that cannot be read, or is none: it would be read without end."""
    if not key.is_fifo():  # which gives its content once
        read_few(key)


@contextlib.contextmanager
def _reading(parameter: str, key: str | Path) -> Iterator[None]:
    """Around what reads a key: its errors say what was expected."""
    try:
        yield
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ReadError(
            f"`{parameter}`: {key}: expected an elliptic-curve key in PEM (P-256, P-384 or P-521): "
            f"{_of_key(error, parameter)}. Make a pair with: openssl ecparam -name prime256v1 "
            "-genkey -noout -out key.pem; openssl ec -in key.pem -pubout -out key.pub"
        ) from error


def _of_key(error: Exception, parameter: str) -> str:
    """What is wrong with a key: model-signing says it of Python's objects, or asks back."""
    if isinstance(error, AttributeError):  # which has no curve
        return "this one is of another kind, such as RSA or Ed25519"
    if isinstance(error, OSError):
        return error.strerror or str(error)
    found = first_line(error)
    if "Password was not given" in found:
        return "this one is encrypted: pass its `password`"
    return (
        f"it holds no {'private' if parameter == 'key' else 'public'} key"
        if "PEM" in found
        else found
    )


def _check_strangers(bundle: Bundle) -> None:
    """Raise `BundleError` for what would be signed though no bundle has it."""
    _check_kinds(bundle.path)
    known = {*bundle.manifest.files, MANIFEST, SIGNATURE, LOCK}
    found = (f.relative_to(bundle.path).as_posix() for f in bundle.path.rglob("*") if f.is_file())
    if strangers := sorted(set(found) - known):
        raise BundleError(
            f"{bundle.path} holds {abbreviate(strangers, 5)}, which {MANIFEST} does not name. "
            "Remove what is no part of the bundle, or wait for the change that is being made."
        )


def _check_kinds(root: Path) -> None:
    """Raise `BundleError` for what is neither a file nor a directory, and a lock with content: a
    signature says nothing of them."""
    for path in sorted(root.rglob("*")):
        mode = path.lstat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise BundleError(f"{path} is a link, a pipe or a device")
    lock = root / LOCK
    if lock.exists() and not (lock.is_file() and lock.stat().st_size == 0):
        raise BundleError(f"{lock} is no empty file")


def _check_form(content: bytes) -> None:
    """A signature is written in one way, to the byte: what it does not sign, itself, has no room
    for changes either.

    Raises:
        ValueError, LookupError, TypeError: it was written otherwise.
    """
    found = json.loads(content)
    envelope = found["dsseEnvelope"]
    (signed,) = envelope["signatures"]
    for value in (envelope["payload"], signed["sig"]):
        if base64.b64encode(base64.b64decode(value, validate=True)).decode() != value:
            raise ValueError(f"{SIGNATURE} was changed")
    expected = {
        "mediaType": "application/vnd.dev.sigstore.bundle.v0.3+json",
        "verificationMaterial": {
            "publicKey": {"hint": found["verificationMaterial"]["publicKey"]["hint"]},
            "tlogEntries": [],
        },
        "dsseEnvelope": {
            "payload": envelope["payload"],
            "payloadType": envelope["payloadType"],
            "signatures": [{"sig": signed["sig"], "keyid": ""}],
        },
    }
    if json.dumps(expected, separators=(",", ":")).encode() != content:
        raise ValueError(f"{SIGNATURE} was changed, or has a form that is not known here")
