"""The verdict on each answer."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import dataclass
from enum import Enum

import numpy as np

from hhdeploy.bundle.answers import Logits
from hhdeploy.loadtest.expected import Expectations
from hhdeploy.loadtest.timeline import Version
from hhdeploy.loadtest.traffic import Request


class Verdict(str, Enum):
    """What an answer was. The last four are faults."""

    RIGHT = "right"
    REFUSED = "refused as expected"
    WRONG = "wrong"
    UNEXPECTED = "refused unexpectedly"
    LOST = "lost"
    UNANSWERED = "unanswered"


FAULTS = (Verdict.WRONG, Verdict.UNEXPECTED, Verdict.LOST, Verdict.UNANSWERED)


@dataclass(frozen=True)
class Reply:
    """What came back over HTTP.

    Attributes:
        status: 0 if the connection broke, None if nothing came in time.
        body: as it came, or what broke the connection.
        json_length: bytes of its JSON, if binary tensors follow it.
    """

    status: int | None
    body: bytes = b""
    json_length: int | None = None


@dataclass(frozen=True)
class Exchange:
    """A request and its answer; seconds of one clock.

    Attributes:
        due: when it should have been sent; ``sent`` in a closed loop.
        sent: just before it was.
        answered: when its answer was complete.
    """

    request: Request
    due: float
    sent: float
    answered: float
    answer: Reply

    @property
    def seconds(self) -> float:
        """Latency, from when it was due: a generator that is late hides nothing."""
        return self.answered - self.due


@dataclass(frozen=True)
class Judgement:
    """A verdict, and what to know of a fault."""

    verdict: Verdict
    detail: str = ""


def judge(exchange: Exchange, possible: Set[Version], expected: Expectations) -> Judgement:
    """Compare an answer with what its adapter may have said.

    Args:
        exchange: what was asked and answered.
        possible: versions that the adapter may have had, None: it may have been away.
        expected: what each version says. All images of a request must be of one version.
    """
    answer, task = exchange.answer, exchange.request.task
    name = expected.names[task]
    if answer.status is None:
        return Judgement(Verdict.UNANSWERED, name)
    if answer.status == 0:
        return Judgement(Verdict.LOST, f"{name}: {answer.body.decode('utf-8', 'replace')}")
    if answer.status == 404 and None in possible:
        return Judgement(Verdict.REFUSED)
    if answer.status != 200:
        said = answer.body[:200].decode("utf-8", "replace")
        return Judgement(Verdict.UNEXPECTED, f"{name}: status {answer.status}: {said}")
    try:
        logits = read_logits(answer)
    except (ValueError, KeyError, IndexError, TypeError) as error:
        return Judgement(Verdict.WRONG, f"{name}: not an answer of the protocol: {error}")
    images = exchange.request.images
    if any(expected.says(task, v, images, logits) for v in possible if v is not None):
        return Judgement(Verdict.RIGHT)
    allowed = ", ".join(sorted("404" if v is None else f"version {v}" for v in possible))
    return Judgement(Verdict.WRONG, f"{name}: {expected.whose(images, logits)}; expected {allowed}")


def read_logits(answer: Reply) -> Logits:
    """Logits float32 [n, classes] of an answer with one binary output.

    Raises:
        ValueError, KeyError, IndexError, TypeError: it is not one.
    """
    if answer.json_length is None:
        raise ValueError("no binary output")
    content = json.loads(answer.body[: answer.json_length])
    (output,) = content["outputs"]
    if (output["name"], output["datatype"]) != ("logits", "FP32"):
        raise ValueError(f"output {output['name']!r} of type {output['datatype']!r}")
    values = np.frombuffer(answer.body[answer.json_length :], "<f4")
    logits: Logits = values.reshape(output["shape"])
    return logits
