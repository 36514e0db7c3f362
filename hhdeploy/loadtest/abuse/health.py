"""The server's health, asked as an orchestrator asks it: on a connection of its own each time."""

from __future__ import annotations

import asyncio
import time
from urllib.parse import urlsplit

from hhdeploy.loadtest.abuse.children import argument, say, told_to_stop

PER_SECOND = 20
_PATHS = ("/v2/health/live", "/v2/health/ready")
# An orchestrator has given up by then.
_MOST_SECONDS = 10.0


def main() -> None:
    """The process: the server's URL; gives ``{"seconds": [...], "failures": n}``.

    Seconds are those of the answers that were 200, from the moment when each was due. Failures are
    the others.
    """
    say(asyncio.run(_until_told(argument())))


async def _until_told(url: str) -> dict[str, object]:
    where = urlsplit(url)
    assert where.hostname is not None and where.port is not None
    say("begun")
    stop = asyncio.create_task(told_to_stop())
    begin, number = time.perf_counter(), 0
    asked: list[asyncio.Task[float | None]] = []
    while not stop.done():
        due = begin + number / PER_SECOND
        await asyncio.wait([stop], timeout=max(0.0, due - time.perf_counter()))
        path = _PATHS[number % len(_PATHS)]
        asked.append(asyncio.create_task(_ask(where.hostname, where.port, path, due)))
        number += 1
    found = await asyncio.gather(*asked)
    seconds = [round(each, 6) for each in found if each is not None]
    return {"seconds": seconds, "failures": len(found) - len(seconds)}


async def _ask(host: str, port: int, path: str, due: float) -> float | None:
    try:
        line = await asyncio.wait_for(_first_line(host, port, path), _MOST_SECONDS)
    except (OSError, asyncio.TimeoutError):
        return None
    return time.perf_counter() - due if b" 200 " in line else None


async def _first_line(host: str, port: int, path: str) -> bytes:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
        return await reader.readline()
    finally:
        writer.close()
