"""Every kind of abuse in turn, from a bundle to what was measured."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from hhdeploy.errors import SessionError
from hhdeploy.loadtest.abuse.bounds import AbuseReport, Seen, Siege
from hhdeploy.loadtest.abuse.children import child
from hhdeploy.loadtest.abuse.kinds import KINDS
from hhdeploy.loadtest.abuse.wire import Victim
from hhdeploy.loadtest.client import Client, Requests
from hhdeploy.loadtest.drive import Record, drive
from hhdeploy.loadtest.expected import Expectations
from hhdeploy.loadtest.grpc_client import GrpcClient
from hhdeploy.loadtest.judge import FAULTS, Reply, Verdict, judge
from hhdeploy.loadtest.process import Server, running_server
from hhdeploy.loadtest.report import Latencies
from hhdeploy.loadtest.run import CLIENT_SECONDS, MODEL, Stage, Start, Subject, staged
from hhdeploy.loadtest.traffic import Load, zipf_shares

HTTP: Final = "HTTP"
GRPC: Final = "gRPC"
HONEST: Final = 4
# Of each: it asks when it wants to, not when it was answered. Over gRPC they share one.
_CONNECTIONS = 16
# Of its saturation the honest clients ask.
SHARE: Final = 0.5
# Of each connection of the abuser, between two attacks.
PAUSE_SECONDS: Final = 0.0
_WARM_UP_REQUESTS = 200
SATURATION_SECONDS: Final = 3.0
# After which the server's memory must be what it was.
SETTLE_SECONDS: Final = 10.0
# How long the control takes, of the abuse's time.
CONTROL_SHARE: Final = 1.0
# Images of a full batch, by default; and JSON that is more than is read at once.
_BATCH = 32
_MUCH_BYTES = 1 << 19
_SHOWN = 5


@dataclass(frozen=True)
class Campaign:
    """What is tried.

    Attributes:
        kinds: keys of `KINDS`, in that order.
        seconds: of each, and of its control.
        skew: of the adapters' popularity.
        seed: of adapters, images and times.
    """

    kinds: Sequence[str]
    seconds: float = 60.0
    skew: float = 1.1
    seed: int = 0


def run_abuse(
    subject: Subject,
    campaign: Campaign,
    command: Callable[[Start], Sequence[str]],
    step: Callable[[str], None],
    phase: Callable[[str, int, int], None],
) -> AbuseReport:
    """Start a server, measure its saturation, and try each kind with its control before it.

    Args:
        subject: what is tested.
        campaign: what is tried.
        command: the command line of the server, HTTP and gRPC.
        step: told what is being done.
        phase: told how far it is: what, done, of all.

    Raises:
        HhdeployError: the bundle cannot be tested, or the server does not start or not answer.
    """
    with staged(subject, campaign.seed, step, phase) as stage:
        step("starting the server")
        with running_server(command(stage.start), stage.log) as server:
            honest = _Honest(stage, server, campaign)
            step("what it answers at most")
            honest.warm_up()
            wires = dict.fromkeys(_wire(kind) for kind in campaign.kinds)
            saturation = {wire: honest.saturation(wire) for wire in wires}
            sieges = {}
            with child("listener", urlsplit(server.url).hostname or "") as listener:
                for kind in campaign.kinds:
                    rate = saturation[_wire(kind)] * SHARE
                    sieges[kind] = _besiege(kind, honest, rate, listener.begun, step)
        return AbuseReport(campaign.seconds, saturation, sieges, server.code)


def _wire(kind: str) -> str:
    return GRPC if KINDS[kind].grpc else HTTP


def _besiege(
    kind: str, honest: _Honest, rate: float, nobody: int, step: Callable[[str], None]
) -> Siege:
    """The control, of the port ``nobody`` where nothing is abused, then the abuse."""
    server, fleet = honest.server, honest.stage.start.fleet
    host = urlsplit(server.url).hostname or ""
    http_port = urlsplit(server.url).port or 0
    size, adapter = honest.stage.pool.shape[1:], honest.stage.tasks[0].name
    elsewhere = fleet.with_name("elsewhere")
    elsewhere.mkdir(exist_ok=True)
    step(f"{kind}: the control")
    victim = Victim(host, nobody, nobody, adapter, size, str(elsewhere))
    seconds = honest.campaign.seconds * CONTROL_SHARE
    control, _ = honest.beside(kind, victim, rate, seconds)
    before = server.resident_bytes()
    step(f"{kind}: {honest.campaign.seconds:g} s")
    victim = Victim(host, http_port, server.grpc_port, adapter, size, str(fleet))
    abused, attacks = honest.beside(kind, victim, rate, honest.campaign.seconds)
    time.sleep(SETTLE_SECONDS)
    after = server.resident_bytes()
    memory = None if before is None or after is None else (before, after)
    return Siege(control, abused, attacks, memory)


@dataclass(frozen=True)
class _Honest:
    """The honest clients of one server."""

    stage: Stage
    server: Server
    campaign: Campaign

    def warm_up(self) -> None:
        """Batches of every size, and a full one in so much JSON that the other process reads it.

        What takes memory once is there from then on: OpenVINO keeps some of every size of a batch
        that it has seen, whoever sent it.
        """

        async def ask() -> list[Reply]:
            async with self._client(HTTP) as client:
                binary = [await client.infer(*self._images(n)) for n in range(1, _BATCH + 1)]
                body, length = self._images(_BATCH)
                spaces = b" " * _MUCH_BYTES
                content = body[:length] + spaces + body[length:]
                return [*binary, await client.infer(content, length + len(spaces))]

        for answer in asyncio.run(ask()):
            if answer.status != 200:
                raise SessionError(f"the server does not answer: {answer}")

    def _images(self, count: int) -> tuple[bytes, int]:
        """A request of so many images."""
        requests = Requests([self.stage.tasks[0].name], self.stage.pool, count)
        return requests.body(0, [0] * count)

    def saturation(self, wire: str) -> float:
        """Requests a second that they get answered at most; the server is warm after it."""
        first = self._ask(wire, Load(_WARM_UP_REQUESTS, HONEST, skew=self.campaign.skew))
        rate = len(first.exchanges) / first.seconds
        number = max(_WARM_UP_REQUESTS, int(rate * SATURATION_SECONDS))
        record = self._ask(wire, Load(number, HONEST, skew=self.campaign.skew))
        return len(record.exchanges) / record.seconds

    def beside(
        self, kind: str, victim: Victim, rate: float, seconds: float
    ) -> tuple[Seen, Mapping[str, int]]:
        """What they see beside an abuser, and what the abuser saw."""
        number = max(1, int(rate * seconds))
        workers = HONEST * _CONNECTIONS
        load = Load(number, workers, rate, self.campaign.skew, seed=self.campaign.seed)
        attack = {"kind": kind, "victim": asdict(victim), "pause": PAUSE_SECONDS}
        with (
            child("health", self.server.url) as health,
            child("abuser", attack) as abuser,
        ):
            record = self._ask(_wire(kind), load)
        return seen(record, self.stage.expected, health.found), abuser.found

    def _ask(self, wire: str, load: Load) -> Record:
        stage = self.stage
        shares = zipf_shares(len(stage.tasks), load.skew, load.seed)

        async def ask() -> Record:
            async with self._client(wire) as client:
                return await drive(
                    client, load, stage.tasks, stage.pool, shares, lambda done, total: None
                )

        return asyncio.run(ask())

    def _client(self, wire: str) -> Client:
        url, token = self.server.url, self.stage.token
        if wire == HTTP:
            most = HONEST * _CONNECTIONS
            return Client(url, MODEL, token, connections=most, seconds=CLIENT_SECONDS)
        target = f"{urlsplit(url).hostname}:{self.server.grpc_port}"
        return GrpcClient(url, target, MODEL, token, connections=HONEST, seconds=CLIENT_SECONDS)


def seen(record: Record, expected: Expectations, health: Mapping[str, Any]) -> Seen:
    """Judge every answer of a record.

    Args:
        record: of the honest clients.
        expected: what each version of each adapter says.
        health: what the process of that name found.
    """
    wrong = lost = 0
    faults: list[str] = []
    for exchange in record.exchanges:
        timeline = record.churn.timelines[exchange.request.task]
        found = judge(exchange, timeline.possible(exchange.sent, exchange.answered), expected)
        if found.verdict in FAULTS:
            faults.append(f"{found.verdict.value}: {found.detail}")
            wrong += found.verdict is Verdict.WRONG
            lost += found.verdict is not Verdict.WRONG
    return Seen(
        requests=len(record.exchanges),
        wrong=wrong,
        lost=lost,
        faults=faults[:_SHOWN],
        latencies=Latencies.of([e.seconds for e in record.exchanges if e.answer.status == 200]),
        health=Latencies.of(health["seconds"]),
        unwell=health["failures"],
    )
