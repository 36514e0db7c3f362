"""INT8 on processors that add its products exactly, and on those that do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.doctor import examining
from hhdeploy.runtime import backends, onnxruntime_backend, open_session
from hhdeploy.runtime.backends import find_target
from hhdeploy.runtime.processor import int8_units, overflows_in_int8

KEY = "session.x64quantprecision"


@pytest.mark.parametrize(
    ("flags", "overflows"),
    [
        ("fpu avx2", True),
        ("fpu avx2 avx512f", True),
        ("fpu avx2 avx_vnni", False),
        ("avx2 avx_vnni avx512f", True),
        ("avx512f avx512_vnni", False),
        ("avx512f avx512_vnni avx_vnni amx_tile amx_int8", False),
    ],
)
def test_flags_of_processors(tmp_path: Path, flags: str, overflows: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: {flags}\n")
    assert overflows_in_int8(tmp_path / "cpuinfo") is overflows


@pytest.mark.parametrize(
    ("flags", "units", "state"),
    [
        ("avx2", (), "absent"),
        ("avx2 avx512f", (), "absent"),
        ("avx2 avx_vnni", ("VNNI",), "ok"),
        ("avx512f avx512_vnni", ("VNNI",), "ok"),
        ("avx512f avx512_vnni amx_tile amx_int8", ("AMX", "VNNI"), "ok"),
        (None, None, "ok"),
    ],
)
def test_doctor_says_how_int8_runs_here(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    flags: str | None,
    units: tuple[str, ...] | None,
    state: str,
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n" if flags else "Features : asimddp\n")
    assert int8_units(tmp_path / "cpuinfo") == units
    monkeypatch.setattr(examining, "int8_units", lambda: units)
    found = examining.int8_finding()
    assert found.state == state
    assert all(unit in found.detail for unit in units or ())
    assert ("overflow" in found.detail) == (units == ())


def test_what_no_flags_tell(tmp_path: Path) -> None:
    (tmp_path / "arm").write_text("processor : 0\nFeatures : asimddp\n")
    assert overflows_in_int8(tmp_path / "arm") is None
    assert overflows_in_int8(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("overflows", "device"), [(True, "cpu"), (False, "openvino"), (None, "openvino")]
)
def test_auto_takes_exact_products(
    small: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool | None, device: str
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(backends, "overflows_in_int8", lambda: overflows)
    monkeypatch.setattr(onnxruntime_backend, "cuda_available", lambda: False)
    manifest = Bundle.open(small).manifest
    assert find_target(manifest, "auto", "int8").device == device
    assert find_target(manifest, "auto", "float32").device == "openvino"


@pytest.mark.parametrize(("overflows", "careful"), [(True, True), (None, True), (False, False)])
def test_onnx_runtime_takes_slower_kernels_only_where_the_others_may_overflow(
    small: Path, monkeypatch: pytest.MonkeyPatch, overflows: bool | None, careful: bool
) -> None:
    """Where none overflows, as with AMX, they are far slower."""
    monkeypatch.setattr(onnxruntime_backend, "overflows_in_int8", lambda: overflows)
    with open_session(small, device="cpu", threads=1) as session:
        options = session._backend._session.get_session_options()  # type: ignore[attr-defined]
        if careful:
            assert options.get_session_config_entry(KEY) == "1"
        else:
            with pytest.raises(RuntimeError, match=KEY):
                options.get_session_config_entry(KEY)
