"""INT8 on processors that add its products exactly, and on those that do not; cores for us."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from hhdeploy.bundle import Bundle
from hhdeploy.doctor import examining
from hhdeploy.runtime import backends, onnxruntime_backend, open_session, processor
from hhdeploy.runtime import session as session_module
from hhdeploy.runtime.backends import find_target
from hhdeploy.runtime.processor import allowed_cores, cores, int8_units, overflows_in_int8

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


# --- cores --------------------------------------------------------------------------------------


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine of four cores with two threads each, for a process in a group of its own."""
    for cpu in range(8):
        folder = tmp_path / "cpus" / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{cpu % 4},{cpu % 4 + 4}\n")
    (tmp_path / "groups").write_text("1:name=systemd:/elsewhere\n0::/pods/a:b\n")
    (tmp_path / "files" / "pods" / "a:b").mkdir(parents=True)
    monkeypatch.setattr(processor, "_CPUS", tmp_path / "cpus")
    monkeypatch.setattr(processor, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(processor, "_GROUP_FILES", tmp_path / "files")
    monkeypatch.setattr(processor.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("limits", "ours", "expected"),
    [
        ({}, range(8), None),
        ({"pods": "max 100000", "pods/a:b": "max 100000"}, range(8), None),
        ({"pods/a:b": "800000 100000"}, range(8), None),
        ({"pods/a:b": "100000 100000"}, range(8), 1),
        ({"pods/a:b": "150000 100000"}, range(8), 2),
        ({"pods/a:b": "10000 100000"}, range(8), 1),
        ({"pods": "30000 10000", "pods/a:b": "max 100000"}, range(8), 3),  # all of a pod's
        ({".": "200000 100000"}, range(8), 2),  # a container's own, as it sees it
        ({"pods/a:b": "700000 100000"}, range(8), 4),  # two threads of one core are one
        ({}, range(3), 3),
        ({}, (0, 4, 1), 2),
        ({"pods": "100000 100000"}, (0, 4, 1), 1),
    ],
)
def test_a_process_takes_no_more_cores_than_it_may(
    machine: Path,
    monkeypatch: pytest.MonkeyPatch,
    limits: dict[str, str],
    ours: Iterable[int],
    expected: int | None,
) -> None:
    for group, limit in limits.items():
        (machine / "files" / group / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: set(ours))
    assert allowed_cores() == expected
    assert cores() == ("8 cores" if expected is None else f"8 cores, {expected} for this process")


def test_where_nothing_tells_of_a_limit_all_cores_are_ours(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (machine / "groups").unlink()
    monkeypatch.delattr(processor.os, "sched_getaffinity")
    assert allowed_cores() is None


@pytest.mark.parametrize(("threads", "expected"), [(None, 3), (2, 2)])
def test_a_session_takes_the_cores_that_it_may(
    small: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, expected: int
) -> None:
    """A container of few cores on a large machine: each thread beyond these would wait."""
    monkeypatch.setattr(session_module, "allowed_cores", lambda: 3)
    with open_session(small, device="cpu", threads=threads) as session:
        options = session._backend._session.get_session_options()  # type: ignore[attr-defined]
        assert options.intra_op_num_threads == expected
