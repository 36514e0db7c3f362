"""The sockets that a server listens on, the same for both wires."""

from __future__ import annotations

import errno
import socket
from contextlib import suppress

from hhdeploy.errors import DeviceError

_BACKLOG = 2048
# Free ports that are tried until one is free on every address.
_TRIES = 20
_LOOPBACKS = ("127.0.0.1", "::1")


def listen(host: str, port: int, parameter: str) -> list[socket.socket]:
    """Sockets that listen: one, or two of ``localhost`` where the machine has both loopbacks.

    ``::`` takes IPv4 as well.

    Args:
        host: address or name.
        port: 0 takes a free one, of all sockets the same.
        parameter: what the port is called in messages.

    Raises:
        DeviceError: the port is taken, or the host is no address of this machine.
    """
    hosts = _LOOPBACKS if host == "localhost" else (host,)
    for attempt in range(_TRIES):
        try:
            return _on_one_port(hosts, port)
        except OSError as error:
            if port or error.errno != errno.EADDRINUSE or attempt == _TRIES - 1:
                raise DeviceError(
                    f"cannot listen on {host}:{port}: {error.strerror or error}. Choose another "
                    f"`host` or `{parameter}`."
                ) from error
    raise AssertionError("unreachable")


def _on_one_port(hosts: tuple[str, ...], port: int) -> list[socket.socket]:
    found: list[socket.socket] = []
    try:
        for host in hosts:
            try:
                found.append(_socket(host, port))
            except OSError as error:
                # A machine without IPv6 has one loopback.
                if not found or error.errno == errno.EADDRINUSE:
                    raise
            port = found[0].getsockname()[1]
    except OSError:
        for each in found:
            each.close()
        raise
    return found


def _socket(host: str, port: int) -> socket.socket:
    version_6 = ":" in host
    listening = socket.create_server(
        (host, port),
        family=socket.AF_INET6 if version_6 else socket.AF_INET,
        backlog=_BACKLOG,
        dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
    )
    # Its connections inherit this. asyncio sets it only where a socket names its protocol, which
    # these do not: an answer's body would wait until the client, after 40 ms, acknowledges its
    # head.
    with suppress(OSError):
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening
