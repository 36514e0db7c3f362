"""What the log says of a request, on either wire: who asked what, and how it ended."""

from __future__ import annotations

import logging
import re
import secrets
import time
from typing import Final

# The header that carries a request's id, on both wires.
REQUEST_ID: Final = "x-request-id"
_GIVEN_ID = re.compile(r"[\x21-\x7e]{1,128}")
# Of what a line quotes.
_MOST_TEXT = 200


class Asked:
    """One request, from its arrival.

    Attributes:
        id: what the client called it; a name of our own where it gave none that a log can hold.
        said: what its line has beside: the wire says what was asked, and how it ended.
    """

    def __init__(self, peer: str | None, given_id: str | None, **said: object) -> None:
        """``peer``: who asks, an address; None: not known."""
        given = given_id is not None and _GIVEN_ID.fullmatch(given_id)
        self.id = given_id if given and given_id is not None else secrets.token_hex(8)
        self.said: dict[str, object] = {**said, "peer": peer}
        self._begin = time.perf_counter()

    def refused(self, problem: Exception) -> None:
        """It failed: why."""
        self.said["reason"] = str(problem)[:_MOST_TEXT]

    def write(self, log: logging.Logger, level: int) -> None:
        """Its line, once it is answered."""
        if log.isEnabledFor(level):
            ms = round(1e3 * (time.perf_counter() - self._begin), 3)
            log.log(level, "request", extra={**self.said, "request_id": self.id, "ms": ms})
