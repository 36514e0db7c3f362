"""demo, doctor and bench, run as a user runs them."""

from __future__ import annotations

import json
import socket

import pytest
from click.testing import CliRunner

from hhdeploy import runtime
from hhdeploy.bundle import remove_adapter
from hhdeploy.cli import main
from hhdeploy.doctor import examining as doctor
from hhdeploy.errors import SessionError
from hhdeploy.runtime import session as sessions
from tests.workshop import copy_bundle


def test_doctor_reports_what_is_installed_and_starts_no_telemetry(tmp_path, monkeypatch):
    """At a home of its own, with the variable as a user has it who never heard of it: what doctor
    imports leaves no id there."""
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "HHDEPLOY_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path))
    result = CliRunner().invoke(main, ["doctor", "--json"])
    found = {f["what"]: f for f in json.loads(result.stdout)}
    assert found["extra export"]["state"] == "ok"
    assert "torch" in found["extra export"]["detail"]
    assert "CPUExecutionProvider" in found["ONNX Runtime providers"]["detail"]
    assert {"NVIDIA driver", "cuda-bindings", "tensorrt", "tensorrt-rtx"} <= found.keys()
    assert result.exit_code == 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_doctor_names_every_extra(monkeypatch):
    """Those that pyproject.toml has; rtx and tensorrt are tried under their own names."""
    monkeypatch.setattr(doctor, "_probe", lambda what, code: doctor.Finding(what, "ok", ""))
    monkeypatch.setattr(doctor, "_gpu_probe", lambda name: doctor.Finding(name, "ok", ""))
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    found = {finding.what: finding for finding in doctor.examine()}
    for extra in ("export", "cpu", "gpu", "openvino", "serve", "ray", "calibrate"):
        finding = found[f"extra {extra}"]
        assert finding.state == "absent"
        assert f"pip install 'hhdeploy[{extra}]'" in finding.detail
    assert "nncf" in found["extra calibrate"].detail
    assert "starlette" in found["extra ray"].detail
    assert found.keys() >= {"tensorrt", "tensorrt-rtx", "cuda-bindings"}


def test_doctor_names_packages_that_are_too_old(monkeypatch):
    old = {"openvino": "2024.6.0", "onnx-ir": "0.1.2"}
    monkeypatch.setattr(doctor, "_version", lambda package: old.get(package, "9999"))
    openvino, export, calibrate = map(doctor._extra, ("openvino", "export", "calibrate"))
    assert {f.state for f in (openvino, export, calibrate)} == {"problem"}
    assert "openvino 2024.6.0 (expected 2025.0)" in openvino.detail
    assert "pip install -U 'hhdeploy[openvino]'" in openvino.detail
    assert "onnx-ir 0.1.2" in export.detail
    assert "onnx-ir 0.1.2" in calibrate.detail  # what it brings along counts too


def test_to_calibrate_either_wheel_of_onnx_runtime_will_do(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda p: None if p == "onnxruntime" else "9999")
    assert doctor._extra("calibrate").state == "ok"
    assert doctor._extra("cpu").state == "absent"


def test_doctor_reports_the_clash_of_the_two_onnxruntime_wheels(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda package: "9999")
    monkeypatch.setattr(doctor, "_probe", lambda what, code: doctor.Finding(what, "ok", ""))
    monkeypatch.setattr(doctor, "_gpu_probe", lambda name: doctor.Finding(name, "ok", ""))
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


@pytest.fixture
def opened(monkeypatch):
    """Every session that a command opens."""
    found = []

    def opening(*args, **options):
        found.append(real(*args, **options))
        return found[-1]

    real = runtime.open_session
    for module in (runtime, sessions):
        monkeypatch.setattr(module, "open_session", opening)
    return found


def is_closed(session):
    with pytest.raises(SessionError, match="the session is closed"):
        _ = session.device
    return True


def test_bench_closes_both_sessions_whatever_happens(succeed, refuse, opened, small, tmp_path):
    options = ("--device", "cpu", "--runs", "2", "--batch", "1")
    succeed("bench", small, "--against", small, *options)
    empty = copy_bundle(small, tmp_path / "empty")
    for name in ("alpha", "gamma"):
        remove_adapter(empty, name)
    # Opens, and cannot answer: nothing to ask it for.
    assert "name an adapter" in refuse("bench", small, "--against", empty, *options)
    assert "is not a bundle" in refuse("bench", small, "--against", tmp_path, *options)
    assert len(opened) == 2 + 2 + 1
    assert all(map(is_closed, opened))


def test_serve_closes_its_session_when_it_does_not_start(refuse, opened, small, monkeypatch):
    monkeypatch.setattr("hhdeploy.runtime.serving.logs.log_as_json", lambda level: None)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = refuse("serve", small, "--device", "cpu", "--grpc-port", -1, "--http-port", port)
    assert f"cannot listen on 127.0.0.1:{port}" in line
    line = refuse("serve", small, "--device", "cpu", "--grpc-port", -1, "--pin", "nobody")
    assert "unknown adapter 'nobody'" in line
    assert len(opened) == 2
    assert all(map(is_closed, opened))


def test_demo_without_starter_models_says_where_they_are(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--examples", str(tmp_path)])
    assert result.exit_code == 1
    assert "examples/starter" in result.output


@pytest.mark.slow
def test_demo(tmp_path):
    result = CliRunner().invoke(main, ["demo", "--out", str(tmp_path / "out"), "--threads", "1"])
    assert result.exit_code == 0, result.output
    for task in ("digits", "emoji", "fashion", "textures"):
        assert f"{task} " in result.output
    assert "FAILED" not in result.output
    assert (tmp_path / "out" / "all-tasks" / "parity.json").is_file()
