"""`make gpu-check`: rehearsed on the CPU, and a part that is stopped keeps what it had."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from tests.gpu import __main__ as check
from tests.gpu.summary import PARTS, Files
from tests.leash import leashed
from tests.workshop import ROOT, run_command


def report_of(stem):
    return json.loads(Files(stem).json.read_text())


# --- the whole, on the CPU ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory, workshop, branches):
    """What a dry run by this interpreter leaves: process, report, table.

    Its model is traced already: for the bundle ``branches``.
    """
    folder = tmp_path_factory.mktemp("dry")
    stem, workbench = folder / "report", folder / "workbench"
    workbench.mkdir()
    (workbench / "cache").symlink_to(workshop.cache)
    options = ["--dry", "--report", str(stem), "--workbench", str(workbench)]
    ran = run_command(leashed([sys.executable, "-m", "tests.gpu", *options]))
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    return ran, report_of(stem), Files(stem).text.read_text()


def test_all_four_parts_run(dry):
    _, content, _ = dry
    assert content["dry"] is True
    for name in PARTS:
        part = content["parts"][name]
        assert part["state"] == "finished", name
        assert part["counts"]["passed"] >= 1, name
        assert not part["counts"]["failed"] + part["counts"]["interrupted"], name


def test_every_check_for_onnx_runtime_ran_but_what_a_cpu_lacks(dry):
    _, content, _ = dry
    tests = [test for part in content["parts"].values() for test in part["tests"]]
    left = {
        test["reason"]
        for test in tests
        if test["outcome"] != "passed" and "test_engines.py" not in test["test"]
    }
    serve = {reason for reason in left if reason.startswith("package: ") and "[serve]" in reason}
    assert left - serve == {
        "chip: ONNX Runtime's CPU has no bfloat16 products",
        "graph: torch has no INT8 model here",
    }


def test_what_computed_is_in_the_report(dry):
    _, content, _ = dry
    tests = [test for part in content["parts"].values() for test in part["tests"]]
    said = {
        test["figures"][key] for test in tests for key in ("runtime",) if key in test["figures"]
    }
    assert len(said) == 1
    assert said.pop().startswith("onnxruntime CPUExecutionProvider")
    graphs = {test["figures"].get("cuda_graphs") for test in content["parts"]["speed"]["tests"]}
    assert {True, False} <= graphs
    for part in content["parts"].values():
        assert part["versions"]["python"] and part["gpus"] is not None


def test_the_table_says_that_it_was_a_rehearsal_and_names_the_rest(dry):
    ran, _, text = dry
    assert text.startswith("A dry run: the CPU in a GPU's place. Its figures mean nothing.")
    assert text in ran.stdout
    assert "for want of" in text and "chip: ONNX Runtime's CPU has no bfloat16 products" in text


# --- make ---------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize(
    ("given", "arguments"),
    [
        ((), ""),
        (("GPU_PART=serve",), "--part serve"),
        (("GPU_DRY=1", "GPU_PART=memory"), "--part memory --dry"),
        (("GPU_DRY=0",), ""),
    ],
)
def test_make_uses_the_interpreter_that_is_given_and_installs_nothing(given, arguments):
    # Without what an outer make says: the suite itself is run by one.
    alone = ["env", "-u", "MAKEFLAGS", "-u", "MAKELEVEL", "-u", "MFLAGS", "make"]
    ran = run_command([*alone, "-n", "gpu-check", "GPU_PYTHON=/some/python3", *given])
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.replace("\\\n", "").split() == [
        "/some/python3", "-m", "tests.gpu", *arguments.split(),
    ]  # fmt: skip


def test_exported_models_are_kept_where_the_user_says(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(check, "run_part", lambda part, files, bench, **_: seen.append(bench))
    for given in ([], ["--workbench", str(tmp_path / "bench")]):
        arguments = ["check", "--report", str(tmp_path / "report"), *given]
        monkeypatch.setattr(sys, "argv", arguments)
        assert check.main() == 1  # nothing ran
    assert len(seen) == 2 * len(PARTS) and len(set(seen)) == 2
    assert seen[-1] == tmp_path / "bench" and seen[-1].is_dir() and not seen[0].exists()


@pytest.mark.parametrize("name", ["pytest", "torch"])
def test_without_a_package_it_says_so(name, tmp_path):
    """pytest is what runs it; without torch nothing can be exported, and nothing passes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda name, *rest: None if name == {name!r} "
        "else find(name, *rest)\n"
    )
    stem = tmp_path / "report"
    command = [sys.executable, "-m", "tests.gpu", "--dry", "--part", "memory"]
    ran = run_command([*command, "--report", str(stem)], path=(ROOT, tmp_path))
    assert ran.returncode == 1
    if name == "pytest":
        assert "has no pytest" in ran.stderr
        return
    reasons = {test["reason"] for test in report_of(stem)["parts"]["memory"]["tests"]}
    assert reasons == {"package: torch (pip install 'hhdeploy[export]')"}


# --- parts that do not come to their end ----------------------------------------------------------

HALF = {
    "schema_version": 2, "dry": False, "state": "running",
    "tests": [
        {"test": "speed/test_x.py::test_a", "outcome": "passed", "reason": "", "seconds": 1.0,
         "figures": {"ratio": 1.5}},
        {"test": "speed/test_x.py::test_b", "outcome": "interrupted", "reason": "", "seconds": 0.0,
         "figures": {"half": 2}},
        {"test": "speed/test_x.py::test_c", "outcome": "not reached", "reason": "", "seconds": 0.0,
         "figures": {}},
    ],
}  # fmt: skip


@pytest.fixture
def part(tmp_path, monkeypatch):
    """Run the speed part with a program in pytest's place: ``part(shell)``; its report."""
    half = tmp_path / "half.json"
    half.write_text(json.dumps(HALF))
    files = Files(tmp_path / "report")

    class Impatient(subprocess.Popen):
        """Whose time is up as soon as a program that would sleep has written something."""

        def wait(self, timeout=None):
            if timeout == 570 and "sleep" in program.read_text():
                while not files.part("speed").is_file():
                    assert self.poll() is None, "it ended before it wrote"
                    time.sleep(0.01)
                raise subprocess.TimeoutExpired(self.args, timeout)
            return super().wait(timeout)

    program = tmp_path / "python"

    def run(shell):
        program.write_text(f'#!/bin/sh\ncp {half} "$GPU_PART_REPORT.new"\n{shell}\n')
        program.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setattr(sys, "executable", str(program))
            patch.setattr(check.subprocess, "Popen", Impatient)
            check.run_part("speed", files, tmp_path, dry=False, seconds=570)
        found = check.merge(files, dry=False)["parts"]["speed"]
        return found, check.table(check.merge(files, dry=False))

    return run


SHOW = 'mv "$GPU_PART_REPORT.new" "$GPU_PART_REPORT"'


@pytest.mark.parametrize(
    ("shell", "state"),
    [
        (f"{SHOW}; exec sleep 600", "stopped after 570 s"),
        (f"trap '' INT; {SHOW}; exec sleep 600", "stopped after 570 s"),
        (f"{SHOW}; kill -SEGV $$", "ended with exit code -11"),
        (f"{SHOW}; exit 3", "ended with exit code 3"),
    ],
    ids=["stopped", "killed", "crashed", "broken"],
)
def test_a_part_that_ends_early_keeps_what_it_had(part, monkeypatch, shell, state):
    monkeypatch.setattr(check, "_GRACE_SECONDS", 0.5)
    found, text = part(shell)
    assert found["state"] == state
    assert found["tests"] == HALF["tests"]
    assert state in text and "ratio 1.5" in text and "half 2" in text
    assert not check._passed({"parts": {"speed": found}}, ["speed"])


def test_a_check_that_is_interrupted_by_hand_shows_what_there_is(tmp_path, monkeypatch, capsys):
    def run_part(part, files, workbench, **options):
        files.part(part).write_text(json.dumps(HALF))
        if part == "speed":
            raise KeyboardInterrupt

    monkeypatch.setattr(check, "run_part", run_part)
    monkeypatch.setattr(sys, "argv", ["check", "--report", str(tmp_path / "report")])
    assert check.main() == 1
    assert "ratio 1.5" in capsys.readouterr().out
    parts = report_of(tmp_path / "report")["parts"]
    assert [parts[name]["state"] for name in PARTS] == ["running"] * 2 + ["not run"] * 2


def test_a_part_that_does_not_start_leaves_no_old_report(part, tmp_path):
    Files(tmp_path / "report").part("speed").write_text(json.dumps({**HALF, "state": "finished"}))
    found, text = part("exit 4")
    assert found["state"] == "ended with exit code 4" and not found["tests"]
    assert "ended with exit code 4" in text


def test_the_interpreters_path_is_kept_behind_the_checkout(part, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/tmp/site")
    part(f'echo "$PYTHONPATH" > {tmp_path}/path; {SHOW}; exit 0')
    assert (tmp_path / "path").read_text().strip() == f"{ROOT}{os.pathsep}/tmp/site"
