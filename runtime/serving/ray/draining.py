"""Requests under way in an ingress, counted from their first byte to their last."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from hhdeploy.runtime.serving.errors import StoppingError
from hhdeploy.runtime.serving.http.app import error_response


class Draining:
    """An application that can be drained.

    Ray Serve stops its proxies without a look at what they wait for: whatever is not answered
    when `drain` returns is lost, also a body that is still read or parsed.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._stopping = False
        self._taken: set[asyncio.Future[None]] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer as the application does; once it drains, refuse requests to do something."""
        if scope["type"] != "http":  # it starts or ends
            await self._app(scope, receive, send)
            return
        if self._stopping and scope["method"] == "POST":  # whoever watches goes on
            error = StoppingError("the server is shutting down.")
            await error_response(error)(scope, receive, send)
            return
        # Not the answer as a task: its exception's traceback would hold the task, and it that.
        done = asyncio.get_running_loop().create_future()
        self._taken.add(done)
        try:
            await self._app(scope, receive, send)
        finally:
            self._taken.discard(done)
            done.set_result(None)

    async def drain(self) -> None:
        """Take nothing new, and wait until everything that was taken is answered."""
        self._stopping = True
        if self._taken:
            await asyncio.wait(self._taken)
