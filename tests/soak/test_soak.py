"""That the soaks run and find nothing, a turn or two each; for minutes see the package."""

from __future__ import annotations

import json
import sys

import pytest

from tests.workshop import run_command


def soaked(module, *options):
    done = run_command([sys.executable, "-W", "ignore", "-m", f"tests.soak.{module}", *options])
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="flock and renameat2 of Linux")
def test_writers_a_calibration_and_a_reader():
    pytest.importorskip("nncf", reason="NNCF is not installed")
    found = soaked("bundle", "--seconds", "1")
    assert found["wrong"] == 0
    assert min(found["edits"], found["calibrations"], found["readings"]) > 0, found


def test_a_fleet_whose_folders_are_replaced():
    found = soaked("fleet", "--seconds", "1")
    assert found["wrong"] == 0
    assert min(found["answers"].values()) > 0, "both adapters answered"
    assert found["imports"] >= 2


def test_commands_that_are_killed():
    found = soaked("kills", "--seconds", "1", "--only", "add")
    assert found["wrong"] == 0
    assert all(one["kills"] > 0 for one in found["commands"])
