"""What the head of a request says: what another server could read in another way is refused."""

from __future__ import annotations

from collections.abc import Collection

from starlette.requests import Request

from hhdeploy.runtime.serving.access.hosts import host_name
from hhdeploy.runtime.serving.errors import ForbiddenError, RequestError

_CHUNKED = (b"", b"chunked")


def header(request: Request, name: bytes) -> str | None:
    """A header by its name in lower case. As starlette's mapping, without its exceptions.

    Raises:
        RequestError: it is there twice, so that nobody knows which of them counts.
    """
    found = [value for each, value in request.scope["headers"] if each == name]
    if len(found) > 1:
        raise RequestError(
            f"the header {name.decode()}: expected at most once, found {len(found)} of them."
        )
    return found[0].decode("latin-1") if found else None


def check_head(request: Request, hosts: Collection[str] | None) -> None:
    """Whether a head says in one way only whom it asks, and how its body travels.

    A page whose name was pointed at this machine is refused: its requests have its name.

    Args:
        request: its body is not read.
        hosts: names by which the server may be called; None: any.

    Raises:
        RequestError: RFC 9112 has a server refuse it (3.2, 6.1).
        ForbiddenError: the name is none of ``hosts``.
    """
    host = header(request, b"host")
    if host is None and request.scope.get("http_version") == "1.1":
        raise RequestError("Host: expected the server's name, as HTTP/1.1 has it, found none.")
    if hosts is not None and host_name(host or "") not in hosts:
        raise ForbiddenError(
            f"Host: expected one of {', '.join(sorted(hosts))}, found {(host or '')[:200]!r}. The "
            "operator can allow another among `allowed_hosts`."
        )
    codings = b", ".join(v for name, v in request.scope["headers"] if name == b"transfer-encoding")
    if codings.strip().lower() not in _CHUNKED:
        raise RequestError(
            f"Transfer-Encoding: expected chunked alone, found {codings[:80].decode('latin-1')!r}. "
            "A body that is compressed says so in Content-Encoding."
        )
