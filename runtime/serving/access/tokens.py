"""The tokens that requests present: one for loading adapters, others for everything else.

Files are read at the start and when they are asked to be read again (`Access.read`): a token that
is gone from its file is refused from then on.
"""

from __future__ import annotations

import hmac
import logging
import re
import stat
from collections.abc import Sequence
from pathlib import Path

from hhdeploy.errors import PlanError
from hhdeploy.files.plain import read_few
from hhdeploy.runtime.serving.errors import ForbiddenError, UnauthorizedError
from hhdeploy.runtime.serving.settings import ServeSettings

_LOG = logging.getLogger("hhdeploy.serve")
# What a header can carry; a token that is easy to guess is no token.
_TOKEN = re.compile(r"[\x21-\x7e]{16,1024}")
# One a client, and an old one beside a new one while they change.
_MOST_TOKENS = 64


class Access:
    """Who may ask for what.

    Loading adapters needs the operator's own token. All the rest, but health and the page's files,
    needs one of the inference tokens or the operator's, where there are any.
    """

    def __init__(self, loading: str | None = None, inference: Sequence[str] = ()) -> None:
        """Tokens as they are.

        Args:
            loading: what loading adapters needs; None: nobody may.
            inference: one of which all other requests need; empty: they need none.
        """
        self._loading, self._inference = loading, tuple(inference)

    @classmethod
    def of(cls, settings: ServeSettings) -> Access:
        """What the operator chose. Raises `PlanError`: see `read`."""
        access = cls()
        access.read(settings, first=True)
        return access

    def read(self, settings: ServeSettings, *, first: bool = False) -> None:
        """Read the files again: what they hold now is what counts.

        Args:
            settings: name them.
            first: nobody is answered yet, so that a pipe may be waited for.

        Raises:
            PlanError: one cannot be read, or holds no token; then nothing is changed.
        """
        loading: str | None = None
        inference: tuple[str, ...] = ()
        if settings.token_file is not None:
            (loading,) = _tokens(settings.token_file, "`token_file`", 1, not first)
        if settings.inference_token_file is not None:
            file = settings.inference_token_file
            inference = _tokens(file, "`inference_token_file`", _MOST_TOKENS, not first)
        self._loading, self._inference = loading, inference

    def check_loading(self, authorization: str | None) -> None:
        """Whether a request may load and unload adapters: ``Authorization: Bearer TOKEN``.

        Args:
            authorization: that header of the request.

        Raises:
            ForbiddenError: the operator has not allowed it to anybody.
            UnauthorizedError: the token is missing or wrong.
        """
        if self._loading is None:
            raise ForbiddenError(
                "adapters cannot be loaded over the network: the server was started without "
                "`allow_adapter_loading`."
            )
        if not _presents(authorization, (self._loading,)):
            raise UnauthorizedError(
                "loading adapters needs the header Authorization: Bearer TOKEN."
            )

    def check_asking(self, authorization: str | None) -> None:
        """Whether a request may ask for anything else than health; see `check_loading`.

        Raises:
            UnauthorizedError: tokens are needed, and it has none of them.
        """
        if not self._inference:
            return
        loading = () if self._loading is None else (self._loading,)
        if not _presents(authorization, (*self._inference, *loading)):
            raise UnauthorizedError("this server needs the header Authorization: Bearer TOKEN.")


def _tokens(path: Path, name: str, most: int, plain: bool) -> tuple[str, ...]:
    """The tokens in a file, one a line: 16 to 1,024 printable characters without spaces.

    A file that everybody on the machine may read is warned of, not refused: secrets are mounted
    into containers like that. What a file holds is never shown. ``plain``: see `read_few`.
    """
    try:
        # Editors of Windows put a mark before the first line, which is no part of the token.
        lines = read_few(path, plain=plain).decode("utf-8-sig").strip().split("\n")
        readable = path.stat().st_mode & stat.S_IROTH
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{name}: {path} cannot be read: {error}") from error
    found = tuple(line.strip() for line in lines)
    if len(found) > most or not all(map(_TOKEN.fullmatch, found)):
        expected = "one line" if most == 1 else f"one to {most} lines"
        raise PlanError(
            f"{name}: {path}: expected {expected} of 16 to 1,024 printable ASCII characters "
            "without spaces. Make one with: openssl rand -hex 32 > token"
        )
    if readable:
        _LOG.warning("others may read the token: chmod 600", extra={"file": str(path)})
    return found


def _presents(authorization: str | None, tokens: Sequence[str]) -> bool:
    kind, _, given = (authorization or "").partition(" ")
    presented = given.strip().encode()
    # All of them in constant time, so that the answer's delay tells nothing of any.
    same = [hmac.compare_digest(presented, token.encode()) for token in tokens]
    return kind.lower() == "bearer" and any(same)
