"""What every version of every adapter must say, and whether an answer says it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hhdeploy.algebra import logit_change, logit_range
from hhdeploy.bundle.answers import Logits
from hhdeploy.choices import Precision, Runner
from hhdeploy.errors import PlanError
from hhdeploy.loadtest.variants import Task
from hhdeploy.parity import PARITY, Bound, compare, stage_of
from hhdeploy.runtime.session import Session

_PROBE = "load-test-probe"


def image_pool(count: int, size: tuple[int, int, int], seed: int) -> NDArray[np.float32]:
    """Seeded noise, float32 [count, 3, H, W]."""
    return np.random.default_rng([seed, 4]).standard_normal((count, *size), np.float32)


def parity_bound(device: Runner, precision: Precision) -> Bound:
    """What the parity table allows between two runs of one graph on a device.

    Raises:
        PlanError: the table has no such pair.
    """
    stage = stage_of("branches", device, precision)
    if (stage, precision) not in PARITY:
        raise PlanError(f"no bound is known for {precision} on {device}: choose another precision.")
    return PARITY[stage, precision]


@dataclass(frozen=True)
class Expectations:
    """Logits of every version of every task on the pool of images.

    Attributes:
        names: of the tasks.
        logits: [task][version] -> float32 [pool, classes].
        bound: what an answer may differ, its error as a share of the range of the version's logits
            on the whole pool. Its top-1 is a share of many images, and not asked of one.
    """

    names: Sequence[str]
    logits: Sequence[Sequence[Logits]]
    bound: Bound

    def says(self, task: int, version: int, images: Sequence[int], found: Logits) -> bool:
        """Whether ``found`` [n, classes] is what that version says of all those images."""
        whole = self.logits[task][version]
        expected = whole[list(images)]
        if found.shape != expected.shape:
            return False
        figures = compare(expected, found)
        return figures.max_abs <= self.bound.range_error * logit_range(whole) and (
            figures.cosine is None or figures.cosine >= self.bound.cosine
        )

    def whose(self, images: Sequence[int], found: Logits) -> str:
        """Which adapter and version say ``found``, in words."""
        for task, versions in enumerate(self.logits):
            for version in range(len(versions)):
                if self.says(task, version, images, found):
                    return f"what {self.names[task]} version {version} says"
        return "what no version of any adapter says"

    def told_apart(self) -> float:
        """Share of answers of one version that would be noticed in the place of another's.

        Over all pairs of versions of all adapters with as many classes, and all images.
        """
        by_classes: dict[int, list[Logits]] = {}
        for logits in (version for versions in self.logits for version in versions):
            by_classes.setdefault(logits.shape[1], []).append(logits)
        noticed = pairs = 0
        for group in by_classes.values():
            stacked = np.stack(group)
            for index, logits in enumerate(group):
                allowed = self.bound.range_error * logit_range(logits)
                others = np.delete(stacked, index, axis=0)
                change = np.abs(logit_change(others, np.broadcast_to(logits, others.shape)))
                noticed += int((change.max(axis=2) > allowed).sum())
                pairs += others.shape[0] * len(logits)
        return noticed / pairs if pairs else 1.0


def expect(
    session: Session,
    tasks: Sequence[Task],
    pool: NDArray[np.float32],
    bound: Bound,
    progress: Callable[[int, int], None],
) -> Expectations:
    """Ask a bare session, one version at a time: no other adapter is in its batches.

    Args:
        session: its adapters are removed.
        tasks: whose versions.
        pool: float32 [pool, 3, H, W].
        bound: of the answers.
        progress: called with the number of tasks done, and of all.
    """
    bank = session.adapters
    for name in bank:
        bank.remove(name)
    logits = []
    for done, task in enumerate(tasks):
        versions = []
        for directory in task.versions:
            entry = bank.add(_PROBE, directory)
            versions.append(session.run(pool, _PROBE)[:, : entry.classes].copy())
            bank.remove(_PROBE)
        logits.append(versions)
        progress(done + 1, len(tasks))
    return Expectations([task.name for task in tasks], logits, bound)
