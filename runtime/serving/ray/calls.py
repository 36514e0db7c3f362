"""A call on whichever replica Ray Serve chooses, made again if that one dies."""

from __future__ import annotations

import asyncio
import copy
import logging
from collections.abc import Sequence
from typing import Any, Final

from ray.exceptions import RayActorError, RayTaskError, WorkerCrashedError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from hhdeploy.errors import HhdeployError
from hhdeploy.runtime.serving.errors import BusyError, StoppingError, internal_error

_LOG = logging.getLogger("hhdeploy.serve.ray")
# How a replica that died, or a machine that cannot be reached, looks to who called it.
LOST: Final = (
    RayActorError,
    WorkerCrashedError,
    ReplicaUnavailableError,
    DeploymentUnavailableError,
)
# Between two tries: Ray needs a moment to see that a replica is gone.
_PAUSE_SECONDS = 0.05


async def ask(method: Any, *arguments: object) -> Any:
    """The result of ``method``, a deployment handle's; for calls that may be made twice.

    Tries for as long as the caller waits: bound it. Cancelling the call cancels the replica's.

    Raises:
        HhdeployError: what the replica raised, as it raised it.
        BusyError: too many requests wait for a replica.
        FailedError: it raised something else.
    """
    while True:
        response = method.remote(*arguments)
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError as error:
            raise own_error(error) from None
        except BackPressureError as error:
            raise BusyError(f"no replica takes more. Try again later. ({error})") from None
        except LOST as error:
            _LOG.warning("replica lost: asking another one", extra={"problem": str(error)[:500]})
            await asyncio.sleep(_PAUSE_SECONDS)


def own_error(error: RayTaskError) -> HhdeployError:
    """What a replica raised, out of what Ray wraps it in."""
    cause = error.cause
    if isinstance(cause, HhdeployError):
        # A copy: Ray's error holds its cause, and is the context in which this is raised.
        return copy.copy(cause)
    _LOG.error("a replica failed", exc_info=error)
    return internal_error("replica")


def answered(answers: Sequence[Any]) -> list[Any]:
    """What replicas answered that were all asked; those that died are left out.

    Raises:
        HhdeployError: what one of them raised, as it raised it.
        StoppingError: none is left.
    """
    for answer in answers:
        if isinstance(answer, RayTaskError):
            raise own_error(answer)
        if isinstance(answer, BaseException) and not isinstance(answer, LOST):
            raise answer
    found = [answer for answer in answers if not isinstance(answer, BaseException)]
    if not found:
        raise StoppingError("no replica answers now. Try again later.")
    return found
