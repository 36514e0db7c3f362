"""A test that crashes is one failure, with its frames, and the suite goes on to its end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.workshop import ROOT, run_command

# Seconds, generously: a test that would hang fails instead.
PATIENCE = 60

SUITE = """
import ctypes, os, time
import pytest

def dereference_null():
    ctypes.string_at(0)

@pytest.mark.own_process
def test_that_crashes():
    dereference_null()

@pytest.mark.own_process
def test_that_aborts():
    os.abort()

processes = []

@pytest.mark.own_process
def test_whose_process_is_another():
    assert os.getpid() != int(os.environ["SUITE"])
    processes.append(os.getpid())

@pytest.mark.own_process
def test_whose_process_is_the_same_as_before():
    assert processes == [os.getpid()]

@pytest.mark.own_process
def test_that_fails():
    assert 1 + 1 == 3

@pytest.mark.own_process
def test_that_is_skipped():
    pytest.skip("for a reason")

@pytest.mark.own_process
def test_that_passes(tmp_path):
    (tmp_path / "here").touch()

def test_of_the_suite():
    assert os.getpid() == int(os.environ["SUITE"])

@pytest.mark.own_process
def test_that_crashes_when_it_is_over(request):
    request.addfinalizer(dereference_null)

@pytest.mark.own_process
def test_that_crashes_the_interpreter_at_its_end():
    import atexit
    atexit.register(dereference_null)
"""


@pytest.fixture(scope="module")
def suite(tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """A suite of its own whose first test reads from address 0."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = own_process: crashes\n")
    (folder / "conftest.py").write_text(
        "import os\nos.environ.setdefault('SUITE', str(os.getpid()))\n"
    )
    file = folder / "test_suite.py"
    file.write_text(SUITE)
    return run_command(
        [sys.executable, "-m", "pytest", "-p", "tests.alone", "-p", "no:cacheprovider", "-rA",
         "--strict-markers", str(file)], cwd=folder,
    )  # fmt: skip


def test_the_suite_goes_on(suite):
    assert suite.returncode == pytest.ExitCode.TESTS_FAILED, suite.stdout + suite.stderr
    last = suite.stdout.splitlines()[-1]
    assert "5 failed, 4 passed, 1 skipped" in last, suite.stdout


def test_a_crash_shows_its_signal_and_frames(suite):
    assert "it ended by SIGSEGV" in suite.stdout
    assert "in dereference_null" in suite.stdout  # Python's own frame
    assert "it ended by SIGABRT" in suite.stdout


def test_a_crash_shows_the_frames_of_its_core(suite):
    if shutil.which("gdb") is None:
        pytest.skip("gdb is not installed")
    if Path("/proc/sys/kernel/core_pattern").read_text().strip() != "core":
        pytest.skip("the kernel puts core files elsewhere")
    frames = [line for line in suite.stdout.splitlines() if line.startswith("#")]
    assert any("string_at" in line for line in frames), suite.stdout
    assert any("abort" in line for line in frames), suite.stdout


def test_other_outcomes_are_what_they_are(suite):
    assert "assert (1 + 1) == 3" in suite.stdout
    assert "for a reason" in suite.stdout
    assert "PASSED test_suite.py::test_that_passes" in suite.stdout


def running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_child_ends_with_its_parent(number):
    code = (
        "import subprocess, sys; from tests.leash import leashed\n"
        "child = subprocess.Popen(leashed([sys.executable, '-c', 'print(1, flush=True); "
        "import time; time.sleep(600)']), stdout=subprocess.PIPE)\n"
        "child.stdout.readline(); print(child.pid, flush=True); child.wait()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as parent:  # fmt: skip
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert running(child)
        parent.send_signal(number)
        parent.wait()
    end = time.monotonic() + PATIENCE
    while running(child):
        assert time.monotonic() < end, "the child is still there"
        time.sleep(0.01)


def test_a_command_whose_parent_is_gone_does_not_start(tmp_path):
    ran = run_command(
        [sys.executable, str(ROOT / "tests" / "leash.py"), "1", sys.executable, "-c", "print(1)"]
    )
    assert ran.returncode == 1 and not ran.stdout
    assert "the process that started it is gone" in ran.stderr
