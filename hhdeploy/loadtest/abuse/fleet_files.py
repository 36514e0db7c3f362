"""Folders in the server's fleet whose files are no files, or vast, and requests for them."""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from hhdeploy.loadtest.abuse.wire import Attack, Victim, binary_request, post

_SPARSE_BYTES = 2 << 30
# Longer than the server takes between two looks.
_STAY_SECONDS = 1.5


def pipes(victim: Victim) -> Attack:
    """A pipe, a vast sparse file, a link to a device, or a folder in a file's place."""
    from hhdeploy.adapters.config import CONFIG_FILE, TENSOR_FILE  # and NumPy, for this one alone

    ways: list[Callable[[Path], None]] = [os.mkfifo, _sparse, _device, Path.mkdir]
    names = (CONFIG_FILE, TENSOR_FILE)
    endless = itertools.cycle(itertools.product(ways, names))
    numbers = itertools.count()
    image, headers = binary_request("FP32", [1, *victim.size], bytes(4 * math.prod(victim.size)))

    async def attack() -> str:
        (make, name), number = next(endless), next(numbers)
        folder = Path(victim.fleet, f"abuse-{number}")
        folder.mkdir()
        try:
            make(folder / name)
            for other in {*names} - {name}:
                (folder / other).write_text("{}", encoding="ascii")
            await asyncio.sleep(_STAY_SECONDS)
            return await post(replace(victim, model=folder.name), image, headers)
        finally:
            shutil.rmtree(folder)

    return attack


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(_SPARSE_BYTES)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")
