"""Processes that work beside the load test until they are told to stop.

One is ``main`` of a module of this package, with one JSON value as its argument. It writes a line
once it has begun, goes on until its standard input ends, and then writes one JSON value.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hhdeploy.errors import SessionError

# The abuser has the lowest priority, also for its end.
_STOP_SECONDS = 120.0


@dataclass
class Child:
    """A process at work.

    Attributes:
        begun: what it said when it had begun.
        found: what it said at its end; None before the block is left.
    """

    begun: Any
    found: Any = None


@contextmanager
def child(module: str, argument: object) -> Iterator[Child]:
    """A process that works during the block.

    Args:
        module: of this package; its ``main`` is run.
        argument: what can be written as JSON.

    Raises:
        SessionError: it ended by itself; its own message is on standard error.
    """
    code = f"from {__package__}.{module} import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(argument)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise SessionError(f"the load test's own process {module!r} did not start.")
            found = Child(json.loads(line))
            yield found
            said, _ = process.communicate(timeout=_STOP_SECONDS)
            if process.returncode != 0:
                raise SessionError(f"the load test's own process {module!r} ended by itself.")
            found.found = json.loads(said)
        finally:
            process.kill()


def argument() -> Any:
    """In the process: what it was given."""
    return json.loads(sys.argv[1])


def say(content: object) -> None:
    """In the process: one line, that it has begun or what it found."""
    print(json.dumps(content), flush=True)


async def told_to_stop() -> None:
    """In the process: returns when it is over."""
    await asyncio.to_thread(sys.stdin.read)
