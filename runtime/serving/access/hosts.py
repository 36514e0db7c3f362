"""The names by which HTTP requests call the server, and those that the operator allows."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from functools import lru_cache
from urllib.parse import urlsplit

from hhdeploy.errors import OptionError

# As a browser's address line or a proxy shows it: with its port, and IPv6 in brackets.
_SHOWN = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_][A-Za-z0-9._-]*)(?::[0-9]{0,5})?")


@lru_cache(64)
def host_name(host: str) -> str | None:
    """What a ``Host`` header names: in lower case, without the port; None if it is none."""
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def allowed_name(given: str) -> str:
    """A name that the operator allows, as `host_name` calls it; of an address the usual form.

    Raises:
        OptionError: it is no name, so that no request could ever have it.
    """
    named = host_name(given) if _SHOWN.fullmatch(given) else None
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(named or given))
    if named is None:
        raise OptionError(
            "`allowed_hosts`: expected a name or an address that requests call the server by, "
            "without scheme, path and wildcard, e.g. models.example (one with umlauts as browsers "
            f"send it: xn--bcher-kva.example), found {given!r}."
        )
    return named
