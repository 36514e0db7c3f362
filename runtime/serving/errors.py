"""What a request can be refused with.

    RequestError               400  INVALID_ARGUMENT     the request is wrong
    ├── NotFoundError          404  NOT_FOUND            no such model, adapter or version
    │   └── NotServedError     404  UNIMPLEMENTED        no such method, or one that is not served
    ├── UnauthorizedError      401  UNAUTHENTICATED      a token is missing or wrong
    ├── ForbiddenError         403  PERMISSION_DENIED    the operator did not allow it
    ├── TooLargeError          413  INVALID_ARGUMENT     over a limit on bytes or pixels
    ├── BusyError              429  UNAVAILABLE          the queue is full: try again later
    ├── StoppingError          503  UNAVAILABLE          the server is starting or shutting down
    ├── TimedOutError          504  DEADLINE_EXCEEDED    not answered before its deadline
    ├── NoNumbersError         500  INTERNAL             an adapter's answer is NaN or infinite
    └── FailedError            500  INTERNAL             the session failed, e.g. out of memory
        └── LoadFailedError    503  UNAVAILABLE          machine or device failed as it loaded

Each carries the HTTP status and the name of the gRPC code that say the same.
"""

from __future__ import annotations

import re
from typing import ClassVar

from hhdeploy.errors import HhdeployError

# Of an error's text, which may quote an adapter's configuration. Over gRPC it travels in a header,
# and clients take 8 KiB of all headers together.
_MOST_TEXT = 4000


class RequestError(HhdeployError):
    """A request that is wrong; the message says what was expected and what was found."""

    status: ClassVar[int] = 400
    code: ClassVar[str] = "INVALID_ARGUMENT"
    # What Triton's metric calls it (label `reason` of nv_inference_request_failure).
    reason: ClassVar[str] = "OTHER"


def refusal_kind(error: HhdeployError) -> str:
    """What refusals of a kind are counted as: ``not_found``, ``busy``, ``request``, ..."""
    known = type(error).__name__ if isinstance(error, RequestError) else RequestError.__name__
    return re.sub(r"(?<!^)(?=[A-Z])", "_", known.removesuffix("Error")).lower()


def shown(value: object) -> str:
    """What a message quotes of a request: never long, never control characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def shortened(text: str) -> str:
    """An error's text as a client is told it: at most 4,000 characters."""
    return text if len(text) <= _MOST_TEXT else f"{text[: _MOST_TEXT - 3]}..."


def internal_error(whose: str = "server") -> FailedError:
    """A bug, as a client is told of it; ``whose`` log has its traceback."""
    return FailedError(f"internal error; the {whose}'s log has more.")


class NotFoundError(RequestError):
    """No model, adapter or version of that name."""

    status = 404
    code = "NOT_FOUND"


class NotServedError(NotFoundError):
    """gRPC: no such method, or one of the protocol's that is not served here."""

    code = "UNIMPLEMENTED"


class UnauthorizedError(RequestError):
    """A token is missing or wrong."""

    status = 401
    code = "UNAUTHENTICATED"


class ForbiddenError(RequestError):
    """Something that the operator has not allowed."""

    status = 403
    code = "PERMISSION_DENIED"


class TooLargeError(RequestError):
    """Over a limit on bytes, images or pixels."""

    status = 413


class BusyError(RequestError):
    """The queue is full."""

    status = 429
    code = "UNAVAILABLE"
    reason = "REJECTED"


class StoppingError(RequestError):
    """The server is shutting down and takes nothing new, or is not ready yet."""

    status = 503
    code = "UNAVAILABLE"
    reason = "REJECTED"


class TimedOutError(RequestError):
    """Not answered before the request's deadline or the server's limit."""

    status = 504
    code = "DEADLINE_EXCEEDED"
    reason = "CANCELED"


class NoNumbersError(RequestError):
    """What an adapter answered is no number; the session that computed it is well."""

    status = 500
    code = "INTERNAL"


class FailedError(RequestError):
    """The session failed; not the request's fault."""

    status = 500
    code = "INTERNAL"
    reason = "BACKEND"


class LoadFailedError(FailedError):
    """The machine or its device failed while an adapter was loaded; not the adapter's fault, nor
    the request's."""

    status = 503
    code = "UNAVAILABLE"
