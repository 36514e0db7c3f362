"""The control: a listener that closes whatever connects to it."""

from __future__ import annotations

import asyncio

from hhdeploy.loadtest.abuse.children import argument, say, told_to_stop


def main() -> None:
    """The process: listens on a free port of the host that it is given, says which."""
    asyncio.run(_until_told(argument()))


async def _until_told(host: str) -> None:
    server = await asyncio.get_running_loop().create_server(_Closing, host, 0)
    say(server.sockets[0].getsockname()[1])
    await told_to_stop()
    server.close()
    say(None)


class _Closing(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport.close()
