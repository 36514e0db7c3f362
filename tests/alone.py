"""Tests in a process of their own: one that crashes there fails, and the suite goes on.

    pytestmark = pytest.mark.own_process

The marked tests of a file share a child. One that ends it is a failure, which shows the signal,
Python's frames and, where the kernel leaves a core file and gdb is there, the core's; those after
it get another child. Fixtures are set up in both processes; what `tests.once` made they share. The
child ends with the suite, however that ends.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.leash import leashed

_INSIDE = "HHDEPLOY_TEST_ALONE"
_REPORT = "outcomes"
_MARK = "own_process"
# Of all tests of a file, generously: one that would hang fails instead. Less than pyproject.toml's
# `timeout`, which would end the worker.
_SECONDS = 600
_SHOWN = 6000


@dataclass(frozen=True)
class Outcome:
    """How a test ended in the child: ``passed``, ``failed``, ``skipped`` or ``crashed``."""

    outcome: str
    reason: str


_FOUND: pytest.StashKey[dict[str, Outcome]] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run a marked test, and those of its file that follow, in a child; unless this is it."""
    if pyfuncitem.get_closest_marker(_MARK) is None or _INSIDE in os.environ:
        return None
    found = pyfuncitem.session.stash.setdefault(_FOUND, {})
    if pyfuncitem.nodeid not in found:
        found |= _run_group(pyfuncitem)
    ended = found[pyfuncitem.nodeid]
    if ended.outcome == "skipped":
        pytest.skip(ended.reason)
    if ended.outcome != "passed":
        pytest.fail(f"in a process of its own: {ended.reason}", pytrace=False)
    return True


def _run_group(first: pytest.Function) -> dict[str, Outcome]:
    items = first.session.items
    group = [
        item
        for item in items[items.index(first) :]
        if item.path == first.path and item.get_closest_marker(_MARK) is not None
    ]
    config, tests = first.config, [item.nodeid for item in group]
    where = ["--rootdir", str(config.rootpath)]
    if config.inipath is not None:
        where += ["-c", str(config.inipath)]
    files = [str(config.rootpath / test) for test in tests]
    # Files that a crash leaves, a core among them, go with the directory.
    with tempfile.TemporaryDirectory(prefix="hhdeploy-alone-") as folder:
        return run_alone(tests, [*files, *where], Path(folder))


def run_alone(tests: Sequence[str], arguments: Sequence[str], folder: Path) -> dict[str, Outcome]:
    """Tests in one process whose directory is ``folder``: how they ended, up to a crash."""
    root = Path(__file__).resolve().parents[1]
    path = os.pathsep.join(filter(None, (str(root), os.environ.get("PYTHONPATH"))))
    try:
        ran = subprocess.run(
            leashed([sys.executable, "-X", "faulthandler", "-m", "tests.alone", *arguments]),
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, _INSIDE: "1"},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        code, said = None, f"not done after {_SECONDS} s"
    else:
        code = ran.returncode
        said = f"{ran.stdout[-_SHOWN:]}\n{ran.stderr[-_SHOWN:]}".strip()
    found = _outcomes(folder / _REPORT)
    missing = [test for test in tests if test not in found]
    if code in (0, 1) and not missing:
        return found
    # The test that ran; after the last one, whatever it left behind.
    culprit = missing[0] if missing else tests[-1]
    if code is not None and code < 0:
        said = f"it ended by {signal.Signals(-code).name}\n{said}\n{core_frames(folder)}"
    found[culprit] = Outcome("crashed", said)
    return found


def _outcomes(file: Path) -> dict[str, Outcome]:
    """The worst phase of every test that came to its end."""
    found: dict[str, Outcome] = {}
    ended = set()
    for line in file.read_text().splitlines() if file.is_file() else ():
        test, when, outcome, reason = json.loads(line)
        if when == "teardown":
            ended.add(test)
        if outcome != "passed" or test not in found:
            found[test] = Outcome(outcome, reason)
    return {test: outcome for test, outcome in found.items() if test in ended}


def core_frames(folder: Path) -> str:
    """The native frames of the core file in a directory, or why there are none."""
    cores = sorted(folder.glob("core*"))
    if not cores:
        pattern = Path("/proc/sys/kernel/core_pattern")
        where = pattern.read_text().strip() if pattern.is_file() else "unknown"
        return f"no core file here (the kernel's core_pattern: {where})"
    gdb = shutil.which("gdb")
    if gdb is None:
        return "a core file, and no gdb to read it"
    shown = subprocess.run(
        [gdb, "-batch", "-nx", "-ex", "bt 30", sys.executable, str(cores[0])],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=_SECONDS,
    )
    frames = [line for line in shown.stdout.splitlines() if line.startswith(("#", "Program"))]
    return "the core's frames:\n" + "\n".join(frames or [shown.stdout, shown.stderr])


class _Reporter:
    """Notes how tests end, each at once: a crash is seen from outside."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        line = [report.nodeid, report.when, report.outcome, reason.removeprefix("Skipped: ")]
        with self._file.open("a") as stream:
            stream.write(json.dumps(line) + "\n")


def main(arguments: Sequence[str]) -> int:
    """The child: pytest, with room for a core file."""
    import resource  # not on Windows, where no test needs a child

    _, most = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (most, most))
    reporter = _Reporter(Path.cwd() / _REPORT)
    return int(pytest.main(["-p", "no:cacheprovider", *arguments], plugins=[reporter]))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
