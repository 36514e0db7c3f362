"""The report of `make gpu-check`: nothing that was skipped or failed looks as if it had run."""

from __future__ import annotations

import json

import pytest

from tests.gpu.report import Report


def phase(test, outcome, longrepr=None, when="call", **figures):
    return pytest.TestReport(
        nodeid=f"tests/gpu/test_engines.py::{test}",
        location=("", 0, ""),
        keywords={},
        outcome=outcome,
        longrepr=longrepr,
        when=when,
        duration=0.25,
        user_properties=list(figures.items()),
    )


@pytest.fixture
def report():
    made = Report()
    made.add(phase("test_parity[a]", "passed", when="setup"))
    made.add(phase("test_parity[a]", "passed", range_error=1.25e-4, runtime="x"))
    made.add(phase("test_parity[a]", "passed", when="teardown"))
    for name in ("test_build[a]", "test_build[b]"):
        made.add(phase(name, "skipped", ("conftest.py", 1, "Skipped: no GPU here"), when="setup"))
        made.add(phase(name, "passed", when="teardown"))
    made.add(phase("test_rows", "passed"))
    made.add(phase("test_rows", "failed", "it could not be closed", when="teardown"))
    return made


def test_every_part_with_its_outcome_reason_and_figures(report, tmp_path, monkeypatch):
    monkeypatch.setenv("HHDEPLOY_GPU_REPORT", str(tmp_path / "new" / "here"))
    printed = report.write(tmp_path)
    content = json.loads((tmp_path / "new" / "here.json").read_text())
    assert (content["passed"], content["failed"], content["skipped"]) == (1, 1, 2)
    parts = {part["test"]: part for part in content["parts"]}
    assert parts["test_engines.py::test_parity[a]"] == {
        "test": "test_engines.py::test_parity[a]",
        "outcome": "passed",
        "reason": "",
        "seconds": 0.75,
        "figures": {"range_error": 1.25e-4, "runtime": "x"},
    }
    assert parts["test_engines.py::test_build[b]"]["reason"] == "no GPU here"
    assert parts["test_engines.py::test_rows"]["outcome"] == "failed"
    text = (tmp_path / "new" / "here.txt").read_text()
    assert printed.startswith(text.rstrip("\n"))
    assert "engines: parity[a]: range_error 0.000125, runtime x" in text
    assert "engines: rows: it could not be closed" in text
    assert "skipped 2: no GPU here\n  engines: build" in text
    assert "1 passed, 1 failed, 2 skipped" in text


def test_without_a_name_it_is_in_the_root(report, tmp_path, monkeypatch):
    monkeypatch.delenv("HHDEPLOY_GPU_REPORT", raising=False)
    report.write(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"gpu-report.json", "gpu-report.txt"}
