"""TLS of both wires: one certificate and its key, read again when they are renewed."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import re
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hhdeploy.errors import PlanError
from hhdeploy.files.plain import read_few
from hhdeploy.runtime.serving.settings import ServeSettings

_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")

_LOG = logging.getLogger("hhdeploy.serve")


class Tls:
    """A certificate that connections are taken with.

    Attributes:
        http, grpc: for asyncio; connections that come after `read` get what that found.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        """See `read`."""
        self._cert, self._key = cert, key
        self.http, self.grpc = _Latest("http/1.1"), _Latest("h2")
        self.read()

    @classmethod
    def of(cls, settings: ServeSettings) -> Tls | None:
        """What the operator chose; None: no TLS. Raises `PlanError`: see `read`."""
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return cls(settings.tls_cert, settings.tls_key)

    def read(self) -> None:
        """Read both files again, each once: whoever renews them may do so meanwhile.

        A certificate out of its time is taken, with a warning, where there is no other one yet: the
        clock of a machine that starts may be wrong.

        Raises:
            PlanError: they cannot be read, do not belong together, or are out of their time; then
                nothing is changed.
        """
        again = self.http.latest is not None  # and clients wait: no pipe may keep them waiting
        try:
            with _as_it_is(self._cert, again) as cert, _as_it_is(self._key, again) as key:
                texts = Path(cert).read_bytes(), Path(key).read_bytes()
                fresh = [each.with_files(cert, key) for each in (self.http, self.grpc)]
                problem = _out_of_time(texts[0])
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            found = _found(*texts) if isinstance(error, ssl.SSLError) else str(error)
            raise PlanError(
                f"`tls_cert`, `tls_key`: {self._cert} and {self._key}: expected a certificate "
                f"chain and its key, both PEM and not encrypted: {found or error}"
            ) from error
        if problem and again:
            raise PlanError(
                f"`tls_cert`: {self._cert}: expected certificates that are valid now, found one "
                f"that {problem}. Renew it, or set this machine's clock."
            )
        if problem:
            extra = {"file": str(self._cert), "problem": problem}
            _LOG.warning("clients will refuse the certificate", extra=extra)
        self.http.latest, self.grpc.latest = fresh


class _Latest(ssl.SSLContext):
    """What asyncio holds for as long as it listens: connections are taken with the latest context.

    Files that are read into one that has a certificate join it: OpenSSL keeps one for each type of
    key, and an old one would be shown to clients that prefer its type.

    Attributes:
        latest: with a certificate and its key; None until there is one.
    """

    latest: ssl.SSLContext | None = None
    _protocol: str

    def __new__(cls, protocol: str) -> _Latest:
        """``protocol``: that connections speak, as ALPN calls it."""
        made = super().__new__(cls, ssl.PROTOCOL_TLS_SERVER)
        made._protocol = protocol
        return made

    def with_files(self, cert: str, key: str) -> ssl.SSLContext:
        """One that has these files alone. Raises `OSError` or `ValueError`: they do not fit."""
        made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.set_alpn_protocols([self._protocol])
        made.load_cert_chain(cert, key, _no_password)
        return made

    def wrap_bio(self, *arguments: Any, **options: Any) -> ssl.SSLObject:
        """See `ssl.SSLContext.wrap_bio`: what asyncio calls for each connection."""
        assert self.latest is not None
        return self.latest.wrap_bio(*arguments, **options)


@contextlib.contextmanager
def _as_it_is(path: Path, plain: bool) -> Iterator[str]:
    """A path that gives what a file holds now, as often as it is opened: OpenSSL takes no bytes.

    A key is copied to memory alone; where the system has no files in memory, it is the path itself.
    ``plain``: see `read_few`.
    """
    if sys.platform != "linux":
        yield str(path)
        return
    descriptor = os.memfd_create("hhdeploy-tls")
    with open(descriptor, "wb", buffering=0) as copy:
        copy.write(read_few(path, plain=plain))
        yield f"/proc/self/fd/{descriptor}"


def _found(cert: bytes, key: bytes) -> str:
    """What is wrong with files that OpenSSL does not take, in other words than its own, which name
    its source; "" for something else."""
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509 import load_pem_x509_certificates

    for name, text, kind in (
        ("`tls_cert`", cert, b"CERTIFICATE"),
        ("`tls_key`", key, b"PRIVATE KEY"),
    ):
        there = list(dict.fromkeys(_BLOCK.findall(text)))
        if not any(each.endswith(kind) for each in there):
            found = b", ".join(there).decode() or "none"
            return f"{name}: no PEM block is a {kind.decode()}, found {found}."
    try:
        own = load_pem_private_key(key, None).public_key()
    except (ValueError, TypeError):
        return "`tls_key`: it is damaged, or of an unknown kind."
    try:
        chain = [each.public_key() for each in load_pem_x509_certificates(cert)]
    except ValueError:
        return "`tls_cert`: it is damaged."
    place = next((number for number, each in enumerate(chain, 1) if each == own), None)
    if place is None:
        return "the key belongs to another certificate."
    if place > 1:
        return (
            f"the key belongs to certificate {place} of {len(chain)}. The server's own comes "
            "first, then the one that signed it."
        )
    return ""


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _out_of_time(pem: bytes) -> str:
    """What is wrong with the first certificate of a chain that is not valid now; "" for none."""
    from cryptography.x509 import load_pem_x509_certificates

    now = datetime.datetime.now(datetime.timezone.utc)
    for certificate in load_pem_x509_certificates(pem):
        begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
        if now < begin:
            return f"begins at {begin.isoformat()}"
        if now > end:
            return f"ended at {end.isoformat()}"
    return ""
