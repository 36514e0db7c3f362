"""Memory of a session with one adapter, a hundred, a thousand, each in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.gpu.scale import SCALE
from tests.leash import leashed
from tests.workshop import COMMAND_SECONDS


@pytest.mark.parametrize("count", SCALE.adapters)
def test_memory(ort_cuda, workbench, count, record):
    made = workbench.model(SCALE.model)
    command = [
        sys.executable, "-m", "tests.gpu.memory.opened", str(workbench.single(SCALE.model)),
        str(made.adapter(made.pair[0])), str(count), ort_cuda, "float32",
    ]  # fmt: skip
    ran = subprocess.run(
        leashed(command), capture_output=True, text=True, check=False, timeout=COMMAND_SECONDS
    )
    assert ran.returncode == 0, ran.stderr
    figures = json.loads(ran.stdout.splitlines()[-1])
    record(model=SCALE.model, **figures)
    # A row each, the backbone's, and the one that was added last.
    row = figures["bank_megabytes"] / (count + 2)
    assert figures["adapters"] == count and row > 0
    gpu = figures["gpu_megabytes"]
    assert gpu is None or gpu > figures["bank_megabytes"]
