"""gRPC calls whose names are no text, on connections of their own and many on one."""

from __future__ import annotations

import itertools

from hhdeploy.loadtest.abuse.wire import PREFACE, SETTINGS, Attack, Victim, call, connection, frame

_NAMES = (b"/\xff", b"/inference.GRPCInferenceService/\xc3\x28", b"/\xed\xa0\x80/\0", b"\x80" * 99)
_SERVED = b"/inference.GRPCInferenceService/ServerLive"
_MANY = 20


def names_that_are_no_text(victim: Victim) -> Attack:
    """Names of methods, and of metadata and its values, that are not UTF-8."""
    calls = [
        *((name, ()) for name in _NAMES),
        (_SERVED, ((b"x-\xff", b"a"),)),
        (_SERVED, ((b"x-a", b"\xff\0\x80"),)),
    ]
    several = [
        b"".join(call(2 * number + 1, path, b"", *more) for number in range(count))
        for count in (1, _MANY)
        for path, more in calls
    ]
    endless = itertools.cycle(several)

    async def attack() -> str:
        async with connection(victim.host, victim.grpc_port) as (reader, writer):
            writer.write(PREFACE + frame(SETTINGS, 0, 0, b"") + next(endless))
            # The server's settings, then what it says to the calls.
            greeting, said = await reader.read(1 << 12), await reader.read(1 << 12)
        return "answered" if said else "greeted" if greeting else "closed"

    return attack
