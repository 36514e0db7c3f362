"""A fleet of adapters for a test: a bundle's own, and variants of them.

A variant has the shapes of an adapter of the bundle and other values. It is made for the test,
classifies nothing in particular, and never enters the bundle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hhdeploy.adapters.format import Adapter, Head, SiteTensors, load_adapter, save_adapter
from hhdeploy.bundle import Bundle
from hhdeploy.errors import PlanError
from hhdeploy.files.writing import copy_directory

# Of each adapter: an answer of the version before last must be told from that of the last.
VERSIONS = 3
# One adapter in so many is unknown to the server until it is uploaded.
_UNKNOWN_AT_START = 8
# Noise added to a tensor, as a share of its root mean square.
_SITES, _HEAD = 0.5, 1.0


@dataclass(frozen=True)
class Task:
    """One adapter of the test.

    Attributes:
        name: what requests call it.
        versions: adapter directories; the server starts with the first.
        at_start: whether the server knows it when it starts.
    """

    name: str
    versions: tuple[Path, ...]
    at_start: bool


def make_tasks(bundle: Bundle, count: int, seed: int, fleet: Path, scratch: Path) -> Sequence[Task]:
    """Write a fleet of ``count`` adapters: first the bundle's own, then variants of them in turn.

    Args:
        bundle: only read.
        count: of adapters.
        seed: of the variants.
        fleet: directory for `hhdeploy serve --adapters-dir`, gets those that it starts with.
        scratch: directory for all versions.

    Raises:
        PlanError: a bundle whose adapters cannot change while it is served.
    """
    manifest = bundle.manifest
    if manifest.layout is None or manifest.bank_as_constant:
        raise PlanError(
            f"{bundle.path}: expected a bundle whose adapters can be added and removed. Export "
            "without `fold=True` and without `bank_as_constant=True`."
        )
    own = [entry.name for entry in manifest.adapters]
    if not own:
        raise PlanError(f"{bundle.path} has no adapter to make variants of. Add one first.")
    tasks = []
    for index in range(count):
        source = bundle.path / "adapters" / own[index % len(own)]
        adapter = load_adapter(source)
        is_own = index < len(own)
        name = source.name if is_own else f"{source.name}-variant-{index // len(own)}"
        if not is_own and name in own:
            raise PlanError(f"{bundle.path}: {name!r} is what the test calls its own adapters.")
        versions = [source] if is_own else []
        for version in range(len(versions), VERSIONS):
            directory = scratch / name / str(version)
            rng = np.random.default_rng([seed, index, version])
            save_adapter(vary(adapter, rng), directory)
            versions.append(directory)
        at_start = is_own or index % _UNKNOWN_AT_START != _UNKNOWN_AT_START - 1
        if at_start and not is_own:
            copy_directory(versions[0], fleet / name)
        tasks.append(Task(name, tuple(versions), at_start))
    return tasks


def vary(adapter: Adapter, rng: np.random.Generator) -> Adapter:
    """An adapter of the same shapes that answers otherwise; its configuration says what it is."""

    def noisy(tensor: NDArray[np.float32], share: float) -> NDArray[np.float32]:
        size = float(np.sqrt(np.mean(np.square(tensor, dtype=np.float64)))) if tensor.size else 0.0
        noise = share * size * rng.standard_normal(tensor.shape)
        return (tensor + noise).astype(np.float32)

    sites = {
        name: SiteTensors(
            **{k: None if t is None else noisy(t, _SITES) for k, t in vars(site).items()}
        )
        for name, site in adapter.sites.items()
    }
    head = adapter.head
    if head is not None:
        head = Head(head.path, noisy(head.weight, _HEAD), noisy(head.bias, _HEAD))
    note = "a variant with random values, made for a load test"
    return Adapter(adapter.config.of_other_tensors(note=note), sites, head)
