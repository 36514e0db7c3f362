"""The sockets that a server listens on, the same for both wires, and how many it lets in."""

from __future__ import annotations

import errno
import logging
import resource
import socket
from contextlib import suppress
from typing import Any

from hhdeploy.errors import DeviceError

_LOG = logging.getLogger("hhdeploy.serve")
_BACKLOG = 2048
# Open files beside the connections: the bundle, adapters, libraries, pipes of decoders.
_OTHER_FILES = 512
# Free ports that are tried until one is free on every address.
_TRIES = 20
# No connection can be taken now, whatever comes: asyncio tries again after a second.
_OUT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOOPBACKS = ("127.0.0.1", "::1")


def let_open(sockets: int) -> None:
    """Let this process open files for as many sockets, as far as its hard limit goes: shells and
    systemd give 1024, and whoever comes once they are used up waits, and is told nothing."""
    needed = sockets + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    endless = resource.RLIM_INFINITY
    if soft == endless or soft >= needed:
        return
    allowed = needed if hard == endless else min(needed, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    except (OSError, ValueError):  # macOS allows less than its hard limit says
        allowed = soft
    if allowed < needed:
        _LOG.warning(
            "more connections may come than files may be open: the last would wait without an "
            "answer. Raise the limit (ulimit -n), or serve fewer connections",
            extra={"open_files": allowed, "needed": needed},
        )


def listen(host: str, port: int, parameter: str, most: int) -> list[socket.socket]:
    """Sockets that listen: one, or two of ``localhost`` where the machine has both loopbacks.

    ``::`` takes IPv4 as well.

    Args:
        host: address or name.
        port: 0 takes a free one, of all sockets the same.
        parameter: what the port is called in messages.
        most: connections at the same time, of all sockets together, from their first packet on:
            one that has not said a word, or shakes hands for TLS, has a place. One more is closed
            as it comes.

    Raises:
        DeviceError: the port is taken, or the host is no address of this machine.
    """
    hosts, room = _LOOPBACKS if host == "localhost" else (host,), _Room(most)
    for attempt in range(_TRIES):
        try:
            return [_Listening(each, room) for each in _on_one_port(hosts, port)]
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


class _Room:
    """Places for connections."""

    def __init__(self, most: int) -> None:
        self.free = most


class _Listening(socket.socket):
    """Takes connections as long as there is room."""

    def __init__(self, plain: socket.socket, room: _Room) -> None:
        super().__init__(plain.family, plain.type, plain.proto, fileno=plain.detach())
        self._room = room
        self._pauses = False

    def accept(self) -> tuple[socket.socket, Any]:
        """See `socket.socket.accept`. Raises `ConnectionAbortedError` where it let nobody in.

        Whoever is told that the system is out of something asks no more at once: asyncio would, as
        often as the backlog is long, and have all that is answered wait for a line of each.
        """
        if self._pauses:
            self._pauses = False
            raise BlockingIOError(errno.EAGAIN, "nobody now")
        try:
            taken, address = super().accept()
        except OSError as error:
            self._pauses = error.errno in _OUT_OF
            raise
        if not self._room.free:
            taken.close()
            raise ConnectionAbortedError("no room")
        return _Connection(taken, self._room), address


class _Connection(socket.socket):
    """One that was let in; its place is free once it is closed."""

    def __init__(self, plain: socket.socket, room: _Room) -> None:
        super().__init__(plain.family, plain.type, plain.proto, fileno=plain.detach())
        self._room: _Room | None = room
        room.free -= 1

    def close(self) -> None:
        """See `socket.socket.close`."""
        super().close()
        room, self._room = self._room, None
        if room is not None:
            room.free += 1
