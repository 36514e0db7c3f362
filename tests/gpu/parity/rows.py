"""Rows of an open session's bank that change while other threads run it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest

from hhdeploy.errors import SessionError
from hhdeploy.runtime import Session
from tests.gpu.workbench import Made
from tests.support import assert_parity


def changing_rows(made: Made, session: Session, times: int) -> int:
    """A guest is added, replaced and removed so often, beside three threads whose answers stay
    what they are; how many answers these got."""
    others, done = made.truth(5), Event()
    truths = {name: made.truth_of(name) for name in made.pair}

    def keep_running() -> int:
        runs = 0
        while not done.is_set():
            found = session.run(others.images, others.names)
            assert_parity(others.logits, found, "engine", "float32")
            runs += 1
        return runs

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(keep_running) for _ in range(3)]
        try:
            for _ in range(times):
                for name, truth in truths.items():
                    session.adapters.add("guest", made.adapter(name), replace_existing=True)
                    found = session.run(truth.images, "guest")
                    assert_parity(truth.logits, found, "engine", "float32")
                session.adapters.remove("guest")
                with pytest.raises(SessionError, match="guest"):
                    session.run(others.images, "guest")
        finally:
            done.set()
        return sum(future.result() for future in running)
