"""hhdeploy: one session, side branches, every image with its adapter."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.harness import THREADS
from benchmarks.peers.tasks import BANKS, Array, Case
from hhdeploy.choices import Device, Precision
from hhdeploy.runtime import open_session


class Ours:
    """A session of the case's bundle, which holds one adapter; the others are added live."""

    def __init__(self, case: Case, device: Device, precision: Precision) -> None:
        self.promised = precision
        self._case = case
        self._session = open_session(
            case.bundle,
            device=device,
            precision=precision,
            slots=max(BANKS) + 1,
            threads=THREADS,
            cache=None,
        )

    def add(self, name: str) -> None:
        """Read a converted adapter into a row."""
        if name not in self._session.adapters:
            self._session.adapters.add(name, self._case.imported(name))

    def run(self, images: Array, names: Sequence[str]) -> Array:
        """Logits of a batch."""
        return self._session.run(images, names)

    def close(self) -> None:
        """Close the session."""
        self._session.close()
