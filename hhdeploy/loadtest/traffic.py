"""Which adapter each request asks for, and when: Zipf popularity, Poisson arrivals, seeded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hhdeploy.errors import PlanError


@dataclass(frozen=True)
class Load:
    """How much is asked of a server.

    Attributes:
        requests: in all.
        clients: connections; each waits for its answer before it sends again.
        rate: images a second, at Poisson times (open loop); None: as fast as answers come.
        skew: exponent of Zipf's law, 0: all adapters are equally popular.
        churn: changes of adapters a second.
        images: of one request.
        seed: of everything that is drawn.
    """

    requests: int
    clients: int = 16
    rate: float | None = None
    skew: float = 1.1
    churn: float = 0.0
    images: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("requests", 1), ("clients", 1), ("images", 1)):
            if getattr(self, name) < least:
                raise PlanError(f"{name}: expected {least} or more, found {getattr(self, name)}.")
        if self.skew < 0 or self.churn < 0 or (self.rate is not None and self.rate <= 0):
            raise PlanError("skew and churn: expected 0 or more; rate: more than 0.")


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes:
        task: index of its adapter.
        images: indices into the pool of images.
        at: seconds after the start when it is due; None: as soon as a client is free.
    """

    task: int
    images: tuple[int, ...]
    at: float | None


def zipf_shares(count: int, skew: float, seed: int) -> NDArray[np.float64]:
    """Popularity of ``count`` tasks: the k-th most popular has a share ~ k^-skew; [count], sum 1.

    Which task has which rank is drawn.
    """
    weights = np.arange(1, count + 1, dtype=np.float64) ** -skew
    shares: NDArray[np.float64] = np.random.default_rng([seed, 1]).permutation(
        weights / weights.sum()
    )
    return shares


def poisson_times(count: int, per_second: float, seed: int) -> NDArray[np.float64]:
    """``count`` arrival times in seconds, ascending, of a Poisson process; [count]."""
    gaps = np.random.default_rng([seed, 2]).exponential(1 / per_second, count)
    times: NDArray[np.float64] = np.cumsum(gaps)
    return times


def plan_requests(load: Load, shares: NDArray[np.float64], pool: int) -> Sequence[Request]:
    """All requests of a load, in the order they are sent.

    Args:
        load: what is asked.
        shares: popularity of the tasks, see `zipf_shares`.
        pool: images there are to choose from.
    """
    rng = np.random.default_rng([load.seed, 3])
    tasks = rng.choice(len(shares), load.requests, p=shares)
    images = rng.integers(pool, size=(load.requests, load.images))
    times: Sequence[float | None] = [None] * load.requests
    if load.rate is not None:
        times = poisson_times(load.requests, load.rate / load.images, load.seed).tolist()
    return [
        Request(task, tuple(chosen), at)
        for task, chosen, at in zip(tasks.tolist(), images.tolist(), times, strict=True)
    ]
