"""hhdeploy cache list | clear."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path

import click

from hhdeploy.cli import CONTEXT, Group, ui
from hhdeploy.files.caches import KINDS, LIMIT_VARIABLE, Stored, clear, size_limit, stored_in
from hhdeploy.files.writing import default_cache

_HELP = f"""List and clear what is kept on disk to be faster the next time.

\b
{"".join(f"{kind:12} {what}{chr(10)}" for kind, what in KINDS.items())}
All of it can be made again. Together it takes at most {LIMIT_VARIABLE} (such as 20GB; 10GB if
that is not set): whatever was used longest ago goes when something new is stored.
"""
_directory = click.option(
    "--cache-dir",
    type=ui.DIRECTORY,
    help="Of the cache.  [default: HHDEPLOY_CACHE, else ~/.cache/hhdeploy]",
)


@click.group(cls=Group, context_settings=CONTEXT, help=_HELP)
def command() -> None:
    """See `_HELP`."""


@command.command("list")
@_directory
@ui.json_option
def list_entries(cache_dir: Path | None, as_json: bool) -> None:
    """List the cache's entries, the one used last first."""
    root = cache_dir or default_cache()
    found, limit = stored_in(root), size_limit()
    total = sum(entry.size for entry in found)
    if as_json:
        ui.print_json(
            {
                "directory": str(root),
                "limit_bytes": limit,
                "total_bytes": total,
                "entries": [_to_json(entry) for entry in found],
            }
        )
        return
    rows = [
        (entry.kind, entry.path.name[:12], _size(entry.size), f"{_time(entry):%Y-%m-%d %H:%M}")
        for entry in found
    ]
    if rows:
        ui.console().print(ui.table(None, ("kind", "entry", "size", "last use"), rows))
    click.echo(f"{_size(total)} of {_size(limit)} ({LIMIT_VARIABLE}) in {root}")


@command.command("clear")
@click.argument("kinds", nargs=-1, metavar="[KIND]...", type=click.Choice(list(KINDS)))
@_directory
@ui.json_option
def clear_entries(kinds: tuple[str, ...], cache_dir: Path | None, as_json: bool) -> None:
    """Remove the cache's entries: those of each KIND, or all.

    Processes that use one keep it. What killed processes left half done goes as well.
    """
    root = cache_dir or default_cache()
    removed = clear(root, kinds or tuple(KINDS))
    freed = sum(entry.size for entry in removed)
    if as_json:
        entries = [_to_json(entry) for entry in removed]
        ui.print_json({"directory": str(root), "freed_bytes": freed, "removed": entries})
        return
    what = f"{len(removed)} {'entry' if len(removed) == 1 else 'entries'}"
    click.echo(f"Removed {what} from {root}: {_size(freed)}")


def _to_json(entry: Stored) -> dict[str, object]:
    return {
        "kind": entry.kind,
        "entry": entry.path.name,
        "bytes": entry.size,
        "last_use": _time(entry).isoformat(timespec="seconds"),
    }


def _time(entry: Stored) -> datetime:
    """When it was used last, in this machine's time zone."""
    return datetime.fromtimestamp(entry.used, timezone.utc).astimezone()


def _size(count: int) -> str:
    """Bytes as people write them, decimal as the limit's units are."""
    value, units = float(count), ["B", "kB", "MB", "GB"]
    while value >= 999.95 and units[1:]:
        value, units = value / 1000, units[1:]
    return f"{value:.0f} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
