"""demo, doctor and bench, run as a user runs them."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from hhdeploy import doctor
from hhdeploy.cli import main


def test_doctor_reports_what_is_installed():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    found = {f["what"]: f for f in json.loads(result.stdout)}
    assert found["extra export"]["state"] == "ok"
    assert "torch" in found["extra export"]["detail"]
    assert "CPUExecutionProvider" in found["ONNX Runtime providers"]["detail"]
    assert {"NVIDIA driver", "cuda-bindings", "tensorrt", "tensorrt-rtx"} <= found.keys()
    assert result.exit_code == 0


def test_doctor_reports_the_clash_of_the_two_onnxruntime_wheels(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "1.0")
    monkeypatch.setattr(doctor, "_probe", lambda what, code: doctor.Finding(what, "ok", ""))
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "pip uninstall onnxruntime onnxruntime-gpu" in result.output


def test_bench_alone_and_against(branches, folded):
    alone = CliRunner().invoke(main, ["bench", str(branches), "--json", "--runs", "2"])
    assert [r["batch"] for r in json.loads(alone.stdout)["results"]] == [1, 8]
    options = ["--against", str(folded), "--json", "--runs", "2", "--batch", "3"]
    pair = CliRunner().invoke(main, ["bench", str(branches), *options])
    (result,) = json.loads(pair.stdout)["results"]
    assert result["batch"] == 3
    assert result["ratio"] > 0


def test_demo_without_starter_models_says_where_they_are(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--examples", str(tmp_path)])
    assert result.exit_code == 1
    assert "examples/starter" in result.output


@pytest.mark.slow
def test_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("HHDEPLOY_CACHE", str(tmp_path / "cache"))
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "out"), "--threads", "1"])
    assert result.exit_code == 0, result.output
    for task in ("digits", "emoji", "fashion", "textures"):
        assert f"{task} " in result.output
    assert "FAILED" not in result.output
    assert (tmp_path / "out" / "all-tasks" / "parity.json").is_file()
