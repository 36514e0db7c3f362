"""The reports of a GPU check: nothing that was skipped, failed or left out looks as if it ran."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import onnxruntime as ort
import pytest

from hhdeploy.bundle import Bundle
from tests.gpu import opening
from tests.gpu.memory import opened
from tests.gpu.part import PartReport, plain
from tests.gpu.scale import SCALE
from tests.gpu.summary import Files, merge, table

TESTS = [f"parity/test_x.py::test_{name}" for name in ("parity[a]", "build[a]", "rows", "last")]


def phase(outcome, longrepr=None, when="call"):
    return pytest.TestReport(
        nodeid="any", location=("", 0, ""), keywords={}, outcome=outcome, longrepr=longrepr,
        when=when, duration=0.25,
    )  # fmt: skip


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path / "report")


@pytest.fixture
def report(files):
    made = PartReport(files.part("parity"), TESTS, dry=False)
    first, second, third, _ = TESTS
    made.begin(first)
    made.add(first, phase("passed", when="setup"))
    made.note(first, {"range_error": 1.25e-4, "runtime": "x"})
    made.add(first, phase("passed"))
    made.add(first, phase("passed", when="teardown"))
    made.begin(second)
    skipped = ("conftest.py", 1, "Skipped: package: nncf (pip install it)")
    made.add(second, phase("skipped", skipped, when="setup"))
    made.add(second, phase("passed", when="teardown"))
    made.begin(third)
    made.add(third, phase("passed"))
    made.add(third, phase("failed", "it could not be closed", when="teardown"))
    return made


def stored(files):
    content = json.loads(files.part("parity").read_text())
    return content, {test["test"]: test for test in content["tests"]}


def test_every_test_with_its_outcome_reason_and_figures(report, files):
    _, tests = stored(files)
    assert tests[TESTS[0]] == {
        "test": TESTS[0], "outcome": "passed", "reason": "", "seconds": 0.75,
        "figures": {"range_error": 1.25e-4, "runtime": "x"},
    }  # fmt: skip
    assert tests[TESTS[1]]["outcome"] == "skipped"
    assert tests[TESTS[1]]["reason"] == "package: nncf (pip install it)"
    assert tests[TESTS[2]]["outcome"] == "failed"
    assert tests[TESTS[3]]["outcome"] == "not reached"


def test_the_report_is_whole_after_every_change(files):
    report = PartReport(files.part("parity"), TESTS, dry=True)
    assert stored(files)[0]["state"] == "running"
    report.begin(TESTS[0])
    assert stored(files)[1][TESTS[0]]["outcome"] == "interrupted"
    report.note(TESTS[0], {"half": 1})
    assert stored(files)[1][TESTS[0]]["figures"] == {"half": 1}
    report.add(TESTS[0], phase("passed", when="setup"))
    assert stored(files)[1][TESTS[0]]["outcome"] == "interrupted"
    report.end("finished")
    content, _ = stored(files)
    assert content["state"] == "finished" and content["dry"] is True
    assert {"date", "machine", "gpus", "driver", "driver_version", "versions"} <= set(content)
    assert not [name for name in files.stem.parent.iterdir() if name.suffix == ".new"]


def test_figures_are_plain_json():
    assert [plain(x) for x in (math.inf, math.nan, 1.5, "x")] == ["inf", "nan", 1.5, "x"]
    assert plain(SimpleNamespace(to_json=lambda: {"ratio": 2})) == {"ratio": 2}


def test_the_table_names_what_ran_and_for_want_of_what_the_rest_did_not(report, files):
    report.end("finished")
    content = merge(files, dry=False)
    assert content["parts"]["parity"]["counts"] == {
        "passed": 1, "failed": 1, "skipped": 1, "interrupted": 0, "not reached": 1,
    }  # fmt: skip
    assert content["parts"]["speed"]["state"] == "not run"
    text = table(content)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "parity 1 1 1 0 1 finished" in lines
    assert "speed 0 0 0 0 0 not run" in lines
    assert "passed 0.8 s parity: parity[a]: range_error 0.000125, runtime x" in lines
    assert "failed 0.5 s parity: rows: it could not be closed" in lines
    assert "not reached 0.0 s parity: last" in lines
    where = lines.index("1 package: nncf (pip install it)")
    assert lines[where + 1] == "parity: build"


@pytest.mark.parametrize("dry", [False, True])
def test_a_rehearsal_and_a_check_do_not_mix(files, dry):
    PartReport(files.part("parity"), TESTS, dry=dry).end("finished")
    assert merge(files, dry=dry)["parts"]["parity"]["state"] == "finished"
    other = merge(files, dry=not dry)["parts"]["parity"]
    assert "another kind" in other["state"] and not other["tests"]


# --- the GPU's memory, as far as the driver's library can be played ------------------------------


class Driver:
    """The calls of libcuda that are made, in order; ``broken`` fails."""

    def __init__(self, broken=None):
        self.called, self.broken = [], broken

    def __getattr__(self, name):
        def call(*arguments):
            self.called.append(name)
            if name == "cuMemGetInfo_v2":
                for argument, value in zip(arguments, (5 << 30, 80 << 30), strict=True):
                    argument._obj.value = value
            return 999 if name == self.broken else 0

        return call


def test_the_memory_in_use_is_what_is_not_free(monkeypatch):
    monkeypatch.setattr(opened, "DRY", False)
    driver = Driver()
    monkeypatch.setattr(opened.ctypes, "CDLL", lambda name: driver)
    assert opened.gpu_used() == 75 << 30
    assert driver.called[0] == "cuInit"
    assert driver.called.index("cuCtxPushCurrent_v2") < driver.called.index("cuMemGetInfo_v2")
    monkeypatch.setattr(opened.ctypes, "CDLL", lambda name: Driver("cuDevicePrimaryCtxRetain"))
    with pytest.raises(RuntimeError, match="status 999"):
        opened.gpu_used()


# --- a provider that fell back is a failure -------------------------------------------------------


def test_another_provider_than_asked_for_is_a_failure(small):
    assert SCALE.providers["cuda"] == "CUDAExecutionProvider"
    opening.check_device("onnxruntime CUDAExecutionProvider", "cuda", small, "float32")
    shapes = "onnxruntime CUDAExecutionProvider (3 of 90 nodes on the CPU: Shape)"
    opening.check_device(shapes, "cuda", small, "float32")
    for said in ("onnxruntime CPUExecutionProvider", "openvino CPU"):
        with pytest.raises(AssertionError, match=said):
            opening.check_device(said, "cuda", small, "float32")


def test_where_products_ran_is_seen_in_a_profile(small, monkeypatch):
    graph = Bundle.open(small).graph("float32")
    assert opening.ran_elsewhere(graph, "CPUExecutionProvider") == ()
    if "AzureExecutionProvider" not in ort.get_available_providers():
        pytest.skip("a provider that takes no nodes is needed; this build has none")
    assert "MatMul" in opening.ran_elsewhere(graph, "AzureExecutionProvider")
    providers = {"cuda": "AzureExecutionProvider"}
    monkeypatch.setattr(opening, "SCALE", SimpleNamespace(providers=providers))
    said = "onnxruntime AzureExecutionProvider (onnxruntime 1.23 does not tell which nodes)"
    with pytest.raises(AssertionError, match="MatMul"):
        opening.check_device(said, "cuda", small, "float32")
