"""What the tests of the fleet and of the service share: adapters on disk, and a bank at rest."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from hhdeploy.adapters.format import Adapter, save_adapter
from hhdeploy.runtime.bank import AdapterBank
from tests.support import random_adapter

# For a machine that is busy; nothing here is about time.
PATIENCE = 60.0


def make_adapter(workshop, seed: int) -> Adapter:
    """One that fits beside alpha: its shape, other values."""
    return random_adapter(workshop.backbone.facts, classes=7, seed=100 + seed)


def put_adapter(adapter: Adapter, fleet: Path, name: str) -> Path:
    """Into a fleet directory, in one step: written beside it, then moved."""
    written = fleet.parent / f"written {name}"
    save_adapter(adapter, written, overwrite=True)
    target = fleet / name
    if target.exists():
        shutil.move(target, fleet.parent / f"old {name} {time.monotonic_ns()}")
    shutil.move(written, target)
    return target


def files_of(adapter: Adapter, scratch: Path) -> tuple[bytes, bytes]:
    """What an upload carries."""
    written = scratch / "upload"
    save_adapter(adapter, written, overwrite=True)
    return (
        (written / "adapter_config.json").read_bytes(),
        (written / "adapter_model.safetensors").read_bytes(),
    )


def check_at_rest(bank: AdapterBank) -> None:
    """Nobody holds a row, and every row has a name or is free, and zero."""
    named = {bank[name].row for name in bank}
    assert bank._holds == dict.fromkeys(named, 0)
    assert not bank._retired
    assert bank.free_rows == bank.slots - 1 - len(bank)
    for row in set(range(bank.slots)) - named:
        assert not bank.rows[row].any()


async def until(true: Callable[[], bool]) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.002)


async def settle(turns: int = 20) -> None:
    """Let what can run without a thread run."""
    for _ in range(turns):
        await asyncio.sleep(0)
