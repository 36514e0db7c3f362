"""A load test, from a bundle to a report."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle
from hhdeploy.choices import DEVICES, PRECISIONS, Device, Precision, Runner, one_of
from hhdeploy.files.writing import temporary_directory
from hhdeploy.loadtest.client import Client
from hhdeploy.loadtest.drive import Record, drive
from hhdeploy.loadtest.expected import Expectations, expect, image_pool, parity_bound
from hhdeploy.loadtest.process import running_server
from hhdeploy.loadtest.report import Report, make_report
from hhdeploy.loadtest.traffic import Load, zipf_shares
from hhdeploy.loadtest.variants import Task, make_tasks
from hhdeploy.runtime.backends import find_target
from hhdeploy.runtime.session import open_bundle

# Images that requests choose from.
_POOL = 16
# The server gives a request up earlier.
CLIENT_SECONDS = 60.0
MODEL = "bundle"


@dataclass(frozen=True)
class Subject:
    """What is tested.

    Attributes:
        bundle: only read.
        adapters: of the fleet.
        device, precision, threads: see `open_session`.
    """

    bundle: Path
    adapters: int
    device: Device = "auto"
    precision: Precision = "float32"
    threads: int | None = None

    def __post_init__(self) -> None:
        one_of(DEVICES, self.device, "device")
        one_of(PRECISIONS, self.precision, "precision")


@dataclass(frozen=True)
class Start:
    """What a command that starts a server needs to know.

    Attributes:
        fleet: its directory of adapters.
        token_file: what loading adapters needs.
        model: name of the bundle in the protocol.
        device: the one that gave the expected logits.
    """

    fleet: Path
    token_file: Path
    model: str
    device: Runner


@dataclass(frozen=True, eq=False)
class Stage:
    """All that is there before a server is started.

    Attributes:
        start: what its command needs to know.
        token: what loading adapters needs.
        tasks: the adapters.
        pool: float32 [pool, 3, H, W], images that requests choose from.
        expected: what each version of each adapter says of them.
        log: file for the server's standard error.
    """

    start: Start
    token: str
    tasks: Sequence[Task]
    pool: NDArray[np.float32]
    expected: Expectations
    log: Path


@contextlib.contextmanager
def staged(
    subject: Subject,
    seed: int,
    step: Callable[[str], None],
    phase: Callable[[str, int, int], None],
) -> Iterator[Stage]:
    """Make a fleet, and compute what it must say; its files are there until the end of the block.

    Raises:
        HhdeployError: the bundle cannot be tested.
    """
    bundle = Bundle.open(subject.bundle)
    bundle.manifest.check_logits_alone("a load test")
    device = find_target(bundle.manifest, subject.device, subject.precision).device
    bound = parity_bound(device, subject.precision)
    with temporary_directory("load") as root:
        start = Start(root / "fleet", root / "token", MODEL, device)
        start.fleet.mkdir()
        token = _write_token(start.token_file)
        step(f"a fleet of {subject.adapters} adapters: the bundle's own, and variants of them")
        tasks = make_tasks(bundle, subject.adapters, seed, start.fleet, root / "versions")
        pool = image_pool(_POOL, bundle.manifest.input_size, seed)
        step("what each version of each must say, from a session without a server")
        with open_bundle(
            bundle,
            device=device,
            precision=subject.precision,
            threads=subject.threads,
            partial=True,
        ) as session:
            expected = expect(session, tasks, pool, bound, _phase(phase, "adapters"))
        yield Stage(start, token, tasks, pool, expected, root / "log")


def run_load_test(
    subject: Subject,
    load: Load,
    command: Callable[[Start], Sequence[str]],
    step: Callable[[str], None],
    phase: Callable[[str, int, int], None],
) -> Report:
    """Make a fleet, compute what it must say, start a server, ask it, stop it, judge.

    Args:
        subject: what is tested.
        load: how much is asked of it.
        command: the command line of the server.
        step: told what is being done.
        phase: told how far it is: what, done, of all.

    Raises:
        HhdeployError: the bundle cannot be tested, or the server does not start.
    """
    with staged(subject, load.seed, step, phase) as stage:
        step("starting the server")
        with running_server(command(stage.start), stage.log) as server:
            step(f"{load.requests} requests to {server.url}")
            shares = zipf_shares(len(stage.tasks), load.skew, load.seed)

            async def ask() -> Record:
                async with Client(
                    server.url,
                    MODEL,
                    stage.token,
                    # Changes do not wait for the requests' connections.
                    connections=load.clients + len(stage.tasks),
                    seconds=CLIENT_SECONDS,
                ) as client:
                    progress = _phase(phase, "requests")
                    return await drive(client, load, stage.tasks, stage.pool, shares, progress)

            record = asyncio.run(ask())
        step("comparing the answers")
        return make_report(record, stage.expected, server.code, _phase(phase, "answers"))


def _phase(phase: Callable[[str, int, int], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: phase(name, done, total)


def _write_token(path: Path) -> str:
    token = secrets.token_hex(32)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), "w") as stream:
        stream.write(token)
    return token
