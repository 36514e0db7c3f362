"""What a run leaves out: the table of skips, and the files of tests that take long."""

from __future__ import annotations

import subprocess
import sys

from tests.slow import FILES
from tests.workshop import COMMAND_SECONDS, ROOT

SUITE = """
import pytest

@pytest.mark.parametrize("number", range(3))
def test_of_a_kind(number):
    pytest.skip("no such machine")

@pytest.mark.skip(reason="written   over\\n  two lines")
def test_marked():
    pass

@pytest.mark.skipif(True, reason="no such machine")
def test_condition():
    pass

def test_that_runs():
    pass
"""


def test_reasons_are_counted(tmp_path):
    (tmp_path / "test_it.py").write_text(SUITE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.skips", "--rootdir", tmp_path]
    ran = subprocess.run(
        [*command, "-c", "/dev/null", tmp_path],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
    )
    assert ran.returncode == 0, ran.stdout
    table = ran.stdout.split("skipped, and why", 1)[1].splitlines()[1:4]
    assert [line.strip() for line in table] == [
        "4  no such machine",
        "1  written over two lines",
        "5  skipped in all",
    ]


def test_files_that_are_slow_are_there():
    assert not [file for file in FILES if not file.is_file()]
