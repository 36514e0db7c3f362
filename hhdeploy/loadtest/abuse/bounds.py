"""What abuse may do to others, and whether it did more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from hhdeploy.loadtest.report import Latencies

# Beside the abuse: so often the control's 99th percentile, and so many milliseconds more.
TIMES: Final = 3.0
MORE_MS: Final = 50.0
HEALTH_MORE_MS: Final = 50.0
# Of the server, once the abuse is over.
MORE_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Seen:
    """What the others saw for a while.

    Attributes:
        requests: of the honest clients.
        wrong: answers that were not their adapter's.
        lost: requests without an answer, or refused.
        faults: the first of both, in words.
        latencies: of the requests that were answered, from when each was due.
        health: of the answers that it is well, likewise.
        unwell: health requests that had another answer, or none.
    """

    requests: int
    wrong: int
    lost: int
    faults: Sequence[str]
    latencies: Latencies
    health: Latencies
    unwell: int


@dataclass(frozen=True)
class Siege:
    """One kind of abuse.

    Attributes:
        control: what was seen while the abuser met a listener that closes.
        abused: while it met the server.
        attacks: how often what came of one: a status, ``closed``, ...
        memory: bytes of the server before and after; None where its system does not tell.
    """

    control: Seen
    abused: Seen
    attacks: Mapping[str, int]
    memory: tuple[int, int] | None

    @property
    def allowed_ms(self) -> float | None:
        """Of the honest clients' 99th percentile; None without a control."""
        control = self.control.latencies.p99_ms
        return None if control is None else TIMES * control + MORE_MS

    @property
    def health_allowed_ms(self) -> float | None:
        """Of health's."""
        control = self.control.health.p99_ms
        return None if control is None else control + HEALTH_MORE_MS

    def answers_broken(self) -> list[str]:
        """What nobody may see on any machine, in words."""
        found = []
        for when, seen in (("control", self.control), ("abuse", self.abused)):
            for what, number in (("wrong", seen.wrong), ("lost", seen.lost)):
                if number:
                    found.append(f"{when}: {number} of {seen.requests} requests {what}")
        return found

    def bounds_broken(self) -> list[str]:
        """Bounds of time and memory that do not hold, in words."""
        found = []
        for what, is_ms, allowed in (
            ("p99", self.abused.latencies.p99_ms, self.allowed_ms),
            ("health's p99", self.abused.health.p99_ms, self.health_allowed_ms),
        ):
            if is_ms is None or allowed is None or is_ms > allowed:
                found.append(f"{what}: {_ms(is_ms)}, allowed {_ms(allowed)}")
        if self.abused.unwell:
            found.append(f"health: {self.abused.unwell} requests not answered that it is well")
        if self.memory is not None and self.memory[1] - self.memory[0] > MORE_BYTES:
            more = (self.memory[1] - self.memory[0]) / 2**20
            found.append(f"memory: +{more:.0f} MB, allowed {MORE_BYTES >> 20}")
        return found

    def to_json(self) -> dict[str, Any]:
        """The whole, with what follows from it."""
        return {
            "answers_broken": self.answers_broken(),
            "bounds_broken": self.bounds_broken(),
            "allowed_p99_ms": self.allowed_ms,
            "allowed_health_p99_ms": self.health_allowed_ms,
            "control": asdict(self.control),
            "abused": asdict(self.abused),
            "attacks": dict(self.attacks),
            "server_bytes_before_and_after": self.memory,
        }


@dataclass(frozen=True)
class AbuseReport:
    """The result of all kinds that were tried.

    Attributes:
        seconds: of each.
        saturation: requests a second of the honest clients alone, by wire.
        sieges: by kind.
        exit_code: of the server when it was told to stop; None: it had to be killed.
    """

    seconds: float
    saturation: Mapping[str, float]
    sieges: Mapping[str, Siege]
    exit_code: int | None

    @property
    def passed(self) -> bool:
        """Whether every bound holds, and the server ended as it should."""
        sieges = self.sieges.values()
        return self.exit_code == 0 and not any(
            s.answers_broken() or s.bounds_broken() for s in sieges
        )

    def to_json(self) -> dict[str, Any]:
        """The whole, with what follows from it."""
        return {
            "passed": self.passed,
            "seconds": self.seconds,
            "saturation": {wire: round(rate, 2) for wire, rate in self.saturation.items()},
            "kinds": {kind: siege.to_json() for kind, siege in self.sieges.items()},
            "server_exit_code": self.exit_code,
        }


def _ms(time: float | None) -> str:
    return "none" if time is None else f"{time:.1f} ms"
