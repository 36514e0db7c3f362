"""TLS of both wires: one certificate and its key, read again when they are renewed."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

from hhdeploy.errors import PlanError
from hhdeploy.runtime.serving.settings import ServeSettings


class Tls:
    """A certificate that connections are taken with.

    Attributes:
        context: for asyncio; connections that come after `read` get what that found.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        """See `read`."""
        self._cert, self._key = cert, key
        self.context = _context()
        # Key and certificate, PEM, as gRPC takes them.
        self._pair = b"", b""
        self.read()

    @classmethod
    def of(cls, settings: ServeSettings) -> Tls | None:
        """What the operator chose; None: no TLS. Raises `PlanError`: see `read`."""
        if settings.tls_cert is None or settings.tls_key is None:
            return None
        return cls(settings.tls_cert, settings.tls_key)

    def read(self) -> None:
        """Read both files again.

        Raises:
            PlanError: they cannot be read, or do not belong together; then nothing is changed.
        """
        try:
            pair = self._key.read_bytes(), self._cert.read_bytes()
            # Tried on another one: a pair that does not fit would be half of it in the context.
            for context in (_context(), self.context):
                context.load_cert_chain(self._cert, self._key, _no_password)
        except (OSError, ValueError) as error:  # ssl.SSLError is an OSError
            raise PlanError(
                f"`tls_cert`, `tls_key`: {self._cert} and {self._key}: expected a certificate "
                f"chain and its key, both PEM and not encrypted: {error}"
            ) from error
        self._pair = pair

    def grpc_credentials(self) -> Any:
        """For gRPC's server; every handshake takes the pair that was read last."""
        import grpc  # type: ignore[import-untyped]

        def latest() -> Any:
            return grpc.ssl_server_certificate_configuration([self._pair])

        return grpc.dynamic_ssl_server_credentials(latest(), latest)


def _context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.set_alpn_protocols(["http/1.1"])
    return context


def _no_password() -> str:
    raise ValueError("the key is encrypted")
