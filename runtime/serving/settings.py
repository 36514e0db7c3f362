"""What the operator of a server chose."""

from __future__ import annotations

import logging
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

from hhdeploy.errors import OptionError, PlanError, SessionError

_LOG = logging.getLogger("hhdeploy.serve")
# What a header can carry; a token that is easy to guess is no token.
_TOKEN = re.compile(r"[\x21-\x7e]{16,1024}")


@dataclass(frozen=True)
class Limits:
    """What one request may cost. Beyond them it is refused, never cut.

    Attributes:
        body_bytes: of a request, also once it is decompressed.
        image_pixels: of one encoded picture, read from its header before it is decoded.
        request_seconds: from the first byte to the answer.
        queued_images: images of all requests that wait; more are refused (429, UNAVAILABLE).
        adapter_bytes: of an uploaded adapter's files together.
        bodies_bytes: HTTP bodies of all requests that are read or answered; more are refused (429).
        connections: HTTP connections at the same time; requests on more are refused (503).
    """

    body_bytes: int = 64 << 20
    image_pixels: int = 50_000_000
    request_seconds: float = 30.0
    queued_images: int = 1024
    adapter_bytes: int = 256 << 20
    bodies_bytes: int = 1 << 30
    connections: int = 4096


@dataclass(frozen=True)
class ServeSettings:
    """How a bundle is served.

    Attributes:
        model_name: of the bundle in the protocol; adapters are models of their own beside it.
        max_batch: images of one run, and of one request.
        max_wait: seconds that a request may wait for company, while another batch runs and the
            session could take a second one (``contexts``).
        contexts: runs at the same time.
        adapters_dir: fleet directory, one adapter a folder; None: the bundle's adapters alone.
        watch_seconds: how often the fleet directory is looked through; None: once, at the start.
        pinned: adapters that are never evicted.
        adapter_loading: whether the network may load and unload adapters; needs ``token``.
        token: what it must present then.
        allowed_hosts: names by which HTTP requests may call the server, beside those of the
            loopback; none: any, unless it listens on the loopback alone.
        limits: what one request may cost.
    """

    model_name: str
    max_batch: int = 32
    max_wait: float = 0.002
    contexts: int = 1
    adapters_dir: Path | None = None
    watch_seconds: float | None = None
    pinned: frozenset[str] = frozenset()
    adapter_loading: bool = False
    token: str | None = field(default=None, repr=False)
    allowed_hosts: frozenset[str] = frozenset()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        if self.adapter_loading and self.token is None:
            raise OptionError(
                "--allow-adapter-loading needs --token-file: whoever can reach the port could "
                "replace adapters otherwise. Make one with: openssl rand -hex 32 > token"
            )
        if self.token is not None and not self.adapter_loading:
            raise OptionError(
                "--token-file needs --allow-adapter-loading: nothing else asks for the token, "
                "least of all inference."
            )
        if self.max_batch < 1 or self.contexts < 1:
            raise SessionError("max_batch and contexts: expected 1 or more.")
        if self.adapters_dir is not None and not self.adapters_dir.is_dir():
            raise PlanError(
                f"--adapters-dir: {self.adapters_dir} is not a directory. Expected a folder with "
                "one adapter directory a task."
            )
        if self.watch_seconds is not None and self.adapters_dir is None:
            raise OptionError("--watch-seconds: there is nothing to watch without --adapters-dir.")


def read_token(path: Path) -> str:
    """The token in a file: one line of 16 to 1,024 printable characters without spaces.

    A file that everybody on the machine may read is warned of, not refused: secrets are mounted
    into containers like that.

    Raises:
        PlanError: no such file, or not a token; the content is never shown.
    """
    try:
        token = path.read_text(encoding="utf-8").strip()
        readable = path.stat().st_mode & stat.S_IROTH
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"--token-file: {path} cannot be read: {error}") from error
    if not _TOKEN.fullmatch(token):
        raise PlanError(
            f"--token-file: {path}: expected one line of 16 to 1,024 printable ASCII characters "
            "without spaces. Make one with: openssl rand -hex 32 > token"
        )
    if readable:
        _LOG.warning("others may read the token: chmod 600", extra={"file": str(path)})
    return token
