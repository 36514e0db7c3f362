"""TLS of both wires: one certificate and its key, read again when they are renewed."""

from __future__ import annotations

import contextlib
import os
import ssl
import sys
from collections.abc import Iterator
from pathlib import Path

from hhdeploy.errors import PlanError
from hhdeploy.runtime.serving.settings import ServeSettings


class Tls:
    """A certificate that connections are taken with.

    Attributes:
        http, grpc: for asyncio; connections that come after `read` get what that found.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        """See `read`."""
        self._cert, self._key = cert, key
        self.http, self.grpc = _context("http/1.1"), _context("h2")
        self.read()

    @classmethod
    def of(cls, settings: ServeSettings) -> Tls | None:
        """What the operator chose; None: no TLS. Raises `PlanError`: see `read`."""
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return cls(settings.tls_cert, settings.tls_key)

    def read(self) -> None:
        """Read both files again, each once: whoever renews them may do so meanwhile.

        Raises:
            PlanError: they cannot be read, or do not belong together; then nothing is changed.
        """
        try:
            with _as_it_is(self._cert) as cert, _as_it_is(self._key) as key:
                # Tried on another one: a pair that does not fit would be half of it in the others.
                for context in (_context("h2"), self.http, self.grpc):
                    context.load_cert_chain(cert, key, _no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise PlanError(
                f"`tls_cert`, `tls_key`: {self._cert} and {self._key}: expected a certificate "
                f"chain and its key, both PEM and not encrypted: {error}"
            ) from error


@contextlib.contextmanager
def _as_it_is(path: Path) -> Iterator[str]:
    """A path that gives what a file holds now, as often as it is opened: OpenSSL takes no bytes.

    A key is copied to memory alone; where the system has no files in memory, it is the path itself.
    """
    if sys.platform != "linux":
        yield str(path)
        return
    descriptor = os.memfd_create("hhdeploy-tls")
    with open(descriptor, "wb", buffering=0) as copy:
        copy.write(path.read_bytes())
        yield f"/proc/self/fd/{descriptor}"


def _context(protocol: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols([protocol])
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")
