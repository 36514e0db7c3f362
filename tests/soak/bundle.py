"""Six writers, a calibration in a loop and a reader, all on one bundle.

Every change that was acknowledged must be there at the end, every answer must be its adapter's,
and nobody may call the bundle damaged.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.files.tensors import read_tensors
from hhdeploy.parity import bound, compare
from hhdeploy.runtime import open_session
from tests.crashing import forks
from tests.soak.outcome import finish

WITNESS = Path(__file__).parents[1] / "witnesses" / "v1"
# What writers add: directory, and whose logits it has.
SOURCES = {"rival": WITNESS / "rival", "alpha": WITNESS / "branches" / "adapters" / "alpha"}
WRITERS = 6
_AT_MOST = 8  # adapters of one writer at a time


@dataclass
class Told:
    """What a process did.

    Attributes:
        role: which it was.
        done: edits, calibrations or readings.
        wrong: what must not happen, in words.
        expected: of a writer: its adapters at the end, name -> source.
    """

    role: str
    done: int = 0
    wrong: list[str] = field(default_factory=list)
    expected: dict[str, str] = field(default_factory=dict)


def known_logits() -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Images, and the float32 logits of every source and of gamma."""
    tensors, _ = read_tensors(WITNESS / "added.safetensors", ValueError)
    names = ("alpha", "rival", "gamma")
    return tensors["images"], {name: tensors[f"float32/{name}"] for name in names}


def write(path: Path, number: int, until: float, told: Any) -> None:
    """Add and remove adapters of its own names."""
    own, choice = Told(f"writer {number}"), random.Random(number)
    try:
        while time.monotonic() < until or not own.done:
            removing = len(own.expected) >= _AT_MOST or (own.expected and choice.random() < 0.4)
            if removing:
                name = choice.choice(sorted(own.expected))
                remove_adapter(path, name)
                del own.expected[name]
            else:
                source = choice.choice(sorted(SOURCES))
                # Names come again, with another adapter behind them.
                name = f"w{number}-{choice.randrange(12)}"
                if name in own.expected:
                    continue
                add_adapter(path, name, SOURCES[source])
                own.expected[name] = source
            own.done += 1
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
        own.wrong.append(f"{type(error).__name__}: {error}")
    told.put(own)


def calibrate(path: Path, pictures: Path, until: float, told: Any) -> None:
    """Replace the INT8 graph, on other images every time."""
    from hhdeploy.calibration.settings import CalibrationSettings
    from hhdeploy.quantising import CalibrationOptions, calibrate_bundle

    own = Told("calibrate")
    try:
        while time.monotonic() < until or not own.done:
            settings = CalibrationSettings(images=8 + own.done % 3)
            calibrate_bundle(path, pictures, settings, CalibrationOptions(cache=None, threads=1))
            own.done += 1
    except Exception as error:  # noqa: BLE001
        own.wrong.append(f"{type(error).__name__}: {error}")
    told.put(own)


def read(path: Path, until: float, told: Any) -> None:
    """Open, and compare what every adapter answers with what its row says it is."""
    own = Told("reader")
    images, known = known_logits()
    try:
        while time.monotonic() < until or not own.done:
            graphs = Bundle.open(path).manifest.graphs
            precision = "int8" if own.done % 4 == 3 and "int8" in graphs else "float32"
            stage = "branches" if precision == "float32" else "quantised"
            with open_session(path, device="cpu", precision=precision, threads=1) as session:
                for name in session.adapters:
                    found = session.run(images, name)
                    if not any(_is(known[s], found, stage, precision) for s in _may_be(name)):
                        own.wrong.append(f"{name} answered as none of its adapters")
            own.done += 1
    except Exception as error:  # noqa: BLE001
        own.wrong.append(f"{type(error).__name__}: {error}")
    told.put(own)


def _may_be(name: str) -> tuple[str, ...]:
    return (name,) if name in ("alpha", "gamma") else tuple(SOURCES)


def _is(known: NDArray[Any], found: NDArray[Any], stage: str, precision: str) -> bool:
    return not compare(known, found).failures(bound(stage, precision))


def missing(path: Path, told: list[Told]) -> list[str]:
    """What is not as it was acknowledged, at the end."""
    bundle, wrong = Bundle.open(path), []
    bundle.check_files()
    images, known = known_logits()
    expected = {name: source for one in told for name, source in one.expected.items()}
    there = {a.name for a in bundle.manifest.adapters} - {"alpha", "gamma"}
    wrong += [f"{name} was acknowledged and is not there" for name in expected.keys() - there]
    wrong += [f"{name} was removed and is there" for name in there - expected.keys()]
    with open_session(path, device="cpu", threads=1) as session:
        for name in sorted(there & expected.keys()):
            source = expected[name]
            if not _is(known[source], session.run(images, name), "branches", "float32"):
                wrong.append(f"{name} is not {source}")
            kept = bundle.load_adapter(name)
            if not np.array_equal(kept.head.weight, _head(source)):
                wrong.append(f"adapters/{name} is not {source}")
    hidden = {p.name for p in path.iterdir() if p.name.startswith(".")} - {".old"}
    return wrong + [f"{name} is left" for name in sorted(hidden)]


def _head(source: str) -> NDArray[Any]:
    from hhdeploy.adapters.format import load_adapter

    head = load_adapter(SOURCES[source]).head
    assert head is not None
    return head.weight


def soak(folder: Path, seconds: float) -> dict[str, Any]:
    """All processes on one bundle below ``folder``."""
    from tests.calibration.conftest import write_pictures

    path = folder / "bundle"
    shutil.copytree(WITNESS / "branches", path)
    for number, adapter in enumerate(("alpha", "gamma")):
        write_pictures(folder / "pictures" / adapter / "a", 12, number)
    context = forks()
    told = context.Queue()
    until = time.monotonic() + seconds
    jobs = [context.Process(target=write, args=(path, n, until, told)) for n in range(WRITERS)]
    jobs.append(context.Process(target=calibrate, args=(path, folder / "pictures", until, told)))
    jobs.append(context.Process(target=read, args=(path, until, told)))
    for job in jobs:
        job.daemon = True
        job.start()
    results = [told.get(timeout=seconds + 300) for _ in jobs]
    for job in jobs:
        job.join(60)
    writers = [one for one in results if one.role.startswith("writer")]
    wrong = [f"{one.role}: {text}" for one in results for text in one.wrong]
    return {
        "seconds": seconds,
        "edits": sum(one.done for one in writers),
        "calibrations": next(one.done for one in results if one.role == "calibrate"),
        "readings": next(one.done for one in results if one.role == "reader"),
        "wrong": wrong + missing(path, writers),
    }


@click.command(help=__doc__)
@click.option("--seconds", default=120.0, show_default=True)
def main(seconds: float) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="hhdeploy-soak-") as folder:
        finish(soak(Path(folder), seconds))


if __name__ == "__main__":
    sys.exit(main())
