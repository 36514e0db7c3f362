"""One kind of abuse, in a process of the lowest priority: what it costs, the server pays."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Mapping

from hhdeploy.loadtest.abuse.children import argument, say, told_to_stop
from hhdeploy.loadtest.abuse.kinds import KINDS, Abuse
from hhdeploy.loadtest.abuse.wire import Attack, Victim

_LOWEST = 19
# Before a connection that came to nothing is tried again: a loop without it would measure itself.
_CLOSED_SECONDS = 0.01
# Longer than the server lets it last.
_MOST_SECONDS = 90.0


def main() -> None:
    """The process: ``{"kind", "victim", "pause"}``; gives how often what came of an attack."""
    given = argument()
    os.nice(_LOWEST)
    abuse = KINDS[given["kind"]]
    found = asyncio.run(_until_told(abuse, Victim(**given["victim"]), given["pause"]))
    say(found)


async def _until_told(abuse: Abuse, victim: Victim, pause: float) -> Mapping[str, int]:
    attack, tally = abuse.prepare(victim), Counter[str]()
    say("prepared")
    stop = asyncio.create_task(told_to_stop())
    again = [_again(attack, tally, stop, pause) for _ in range(abuse.connections)]
    attacks = [asyncio.create_task(each) for each in again]
    # None ends before, but by a fault of its own.
    await asyncio.wait([stop, *attacks], return_when=asyncio.FIRST_COMPLETED)
    for each in attacks:
        each.cancel()
    for error in await asyncio.gather(*attacks, return_exceptions=True):
        if isinstance(error, Exception):
            raise error
    return dict(tally.most_common())


async def _again(
    attack: Attack, tally: Counter[str], stop: asyncio.Task[None], pause: float
) -> None:
    while not stop.done():  # `wait_for` may lose a cancellation
        try:
            said = await asyncio.wait_for(attack(), _MOST_SECONDS)
        except asyncio.TimeoutError:
            said = "no answer"
        except (OSError, asyncio.IncompleteReadError):
            said = "closed"
        tally[said] += 1
        await asyncio.sleep(max(pause, _CLOSED_SECONDS) if said == "closed" else pause)
