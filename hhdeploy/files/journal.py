"""A list of the files that a change of a directory writes or drops, while it is under way.

Of what a crash leaves, it tells ours from what somebody else put there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from hhdeploy.errors import WriteError
from hhdeploy.files.plain import read_plain
from hhdeploy.files.writing import json_bytes, sync_directory, write_bytes

JOURNAL = ".changing"


def write_journal(root: Path, files: Sequence[str]) -> None:
    """Keep the names of files, relative to ``root``, before anything happens to them.

    Raises:
        WriteError: a folder on the way to one is a symbolic link.
    """
    for file in files:
        for folder in (root / file).parents:
            if folder.is_relative_to(root) and folder != root and folder.is_symlink():
                raise WriteError(
                    f"{folder} is a symbolic link: what it leads to may be others' as well. A "
                    "bundle is changed where its folders are its own: put a copy in its place."
                )
    write_bytes(root / JOURNAL, json_bytes(list(files)))
    sync_directory(root)


def follow_journal(root: Path, folder: str, named: Collection[str]) -> None:
    """End what the journal was written for.

    Its files that are not among ``named`` are removed, and the folders that are empty then, all of
    them below ``folder``; then the journal itself.
    """
    journal, top = root / JOURNAL, root / folder
    try:
        files = [str(file) for file in json.loads(read_plain(journal))]
    except FileNotFoundError:
        return
    except (OSError, ValueError, TypeError, RecursionError):  # not whole: nothing came after it
        files = []
    changed: set[Path] = set()
    for file in files:
        below = [p for p in (root / file).parents if p.is_relative_to(top) and p != top]
        if file in named or ".." in Path(file).parts or not below:
            continue
        if any(p.is_symlink() for p in (top, *below)):
            continue
        with contextlib.suppress(OSError):
            (root / file).unlink(missing_ok=True)
            changed.update((top, *below))
            for each in below:
                if not any(each.iterdir()):
                    each.rmdir()
    with contextlib.suppress(OSError):
        for place in filter(Path.is_dir, changed):  # else a power cut may leave what nobody knows
            sync_directory(place)
        journal.unlink()
