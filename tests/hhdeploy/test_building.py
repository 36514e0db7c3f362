"""`build`: engines made from bundles with the real compiler and entered in the manifest."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from hhdeploy.building import BuildOptions, build
from hhdeploy.bundle import Bundle
from hhdeploy.bundle.engines import choose_engine, stale
from hhdeploy.bundle.manifest import BANK_FILE, MANIFEST, EngineEntry, plain_name, write_manifest
from hhdeploy.cli import main
from hhdeploy.errors import (
    BundleError,
    ConflictError,
    DeviceError,
    OptionError,
    ParityError,
    PlanError,
)
from hhdeploy.files.writing import sha256_of
from hhdeploy.parity import PARITY
from hhdeploy.verifying.graphs import add_graph, add_typed_graph
from tests.docs.pages import words_of
from tests.workshop import copy_bundle, run_python

RTX = "tensorrt-rtx"
# Pages that build an engine, and what they call the bundle.
PAGES = {"docs/tensorrt.md": "OUT", "docs/commands.md": "tasks", "docs/howto/peft.md": "served"}


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")


@pytest.fixture(scope="module")
def built(rtx, small, tmp_path_factory) -> tuple[Path, EngineEntry]:
    """A side-branch bundle with a float16 graph and engine that were not in it. Read only.

    Built by the command of the documentation's pages, which is the same on all.
    """
    path = copy_bundle(small, tmp_path_factory.mktemp("built") / "bundle")
    (command,) = {
        tuple(words_of(page, f"hhdeploy build {name} --backend {RTX}", **{name: path}))
        for page, name in PAGES.items()
    }
    said = CliRunner().invoke(main, [*command, "--max-slots", "9", "--json"])
    assert said.exit_code == 0, said.output
    return path, EngineEntry.from_json(json.loads(said.stdout))


def test_the_engine_is_in_the_manifest(built, rtx):
    path, entry = built
    bundle = Bundle.open(path)
    assert bundle.manifest.engines == (entry,)
    assert plain_name(entry.file) == "model.float16.tensorrt-rtx.portable.engine"
    assert bundle.file(entry.file).stat().st_size == entry.bytes > 10_000
    assert (entry.backend, entry.version, entry.precision) == (RTX, rtx.__version__, "float16")
    assert (entry.batch, entry.slots) == ((1, 8, 32), (1, len(bundle.bank()), 9))
    assert (entry.architectures, entry.gpu, entry.bank_sha256) == ((), None, None)
    assert entry.graph_sha256 == bundle.manifest.graph_digest("float16")
    assert entry.build_seconds > 0
    assert EngineEntry.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    assert choose_engine(
        bundle.manifest, RTX, "float16", version=rtx.__version__, architecture="sm89"
    ) == entry  # fmt: skip


def test_a_missing_typed_graph_is_made_and_verified(built):
    path, _ = built
    bundle = Bundle.open(path)
    assert plain_name(bundle.manifest.graphs["float16"]) == "model.float16.onnx"
    stages = bundle.parity()["stages"]
    twins = [s for s in stages if s["precision"] == "float16"]
    assert {s["adapter"] for s in twins} == {"alpha", "gamma"}
    assert all(s["stage"] == "twin" and s["passed"] for s in twins)
    assert [s for s in stages if s["precision"] == "float32"], "the others stay"
    for name in bundle.manifest.files:
        bundle.file(name)


@pytest.fixture(scope="module")
def alone(rtx, folded, tmp_path_factory) -> tuple[Path, EngineEntry]:
    """A folded bundle and its engine: built in a third of the time. Read only."""
    path = copy_bundle(folded, tmp_path_factory.mktemp("alone") / "bundle")
    return path, build(path, backend=RTX, options=BuildOptions((2, 3, 5)))


def test_building_again_replaces_the_entry(alone, tmp_path):
    path = copy_bundle(alone[0], tmp_path / "bundle")
    again = build(path, backend=RTX, options=BuildOptions((1, 1, 3)))
    assert Bundle.open(path).manifest.engines == (again,)
    assert again.batch == (1, 1, 3)
    Bundle.open(path).file(again.file)


def test_another_architecture_is_another_engine(alone, tmp_path):
    path = copy_bundle(alone[0], tmp_path / "bundle")
    options = BuildOptions(architectures=("sm86", "sm89"))
    entry = build(path, backend=RTX, options=options)
    assert plain_name(entry.file) == "model.float32.tensorrt-rtx.sm86+sm89.engine"
    manifest = Bundle.open(path).manifest
    assert len(manifest.engines) == 2
    chosen = choose_engine(
        manifest, RTX, "float32", version=entry.version, architecture="sm89"
    )  # fmt: skip
    assert chosen == entry
    other = choose_engine(manifest, RTX, "float32", version=entry.version, architecture="sm120")
    assert other == alone[1]


def test_a_baked_bank_is_marked_and_goes_stale(rtx, small, tmp_path):
    path = copy_bundle(small, tmp_path / "bundle")
    entry = build(path, backend=RTX, options=BuildOptions(bank_as_constant=True))
    bundle = Bundle.open(path)
    assert entry.bank_sha256 == bundle.manifest.files[BANK_FILE]
    assert entry.slots is None
    assert "constant-bank" in entry.file
    files = {**bundle.manifest.files, BANK_FILE: "0" * 64}
    write_manifest(path, replace(bundle.manifest, files=files))
    with pytest.raises(BundleError, match="bank baked into it is not the one"):
        choose_engine(
            Bundle.open(path).manifest, RTX, "float32",
            version=entry.version, architecture="sm89",
        )  # fmt: skip


def test_an_engine_of_other_weights_is_stale(built):
    path, entry = built
    manifest = Bundle.open(path).manifest
    assert stale(manifest, entry) is None
    other = replace(
        manifest, files={**manifest.files, f"{manifest.graphs['float16']}.data": "0" * 64}
    )
    assert "another graph" in (stale(other, entry) or "")


def test_folded_bundles_build_without_a_bank(alone):
    path, entry = alone
    assert entry.slots is None
    assert entry.bank_sha256 is None
    for option, value in (("max_slots", 4), ("bank_as_constant", True)):
        with pytest.raises(PlanError, match="folded"):
            build(path, backend=RTX, options=BuildOptions(**{option: value}))


def test_building_needs_no_torch_and_no_onnx(rtx, folded, tmp_path):
    """On an edge box: a bundle, NumPy and the compiler."""
    path = copy_bundle(folded, tmp_path / "bundle")
    code = """
        import sys
        from hhdeploy.building import build
        print(build(sys.argv[1], backend="tensorrt-rtx").bytes)
    """
    done = run_python(code, path, blocked=("torch", "timm", "onnx", "onnx_ir", "onnxscript"))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10_000


def test_refusals_leave_the_bundle_as_it_was(rtx, small, tmp_path):
    path = copy_bundle(small, tmp_path / "bundle")
    before = {f: sha256_of(f) for f in sorted(path.rglob("*")) if f.is_file()}
    refused = (
        ({"precision": "int8"}, r"calibrate\("),
        ({"precision": "float31"}, "`precision='float31'`: expected one of float32, "),
        ({"options": BuildOptions(max_slots=1)}, "the bundle's bank has 3 rows"),
        ({"options": BuildOptions(max_slots=2**31)}, r"TensorRT takes 2,147,483,647 a tensor"),
        ({"options": BuildOptions(architectures=("sm90",))}, "sm90"),
    )
    for arguments, message in refused:
        with pytest.raises(PlanError, match=message):
            build(path, backend=RTX, **arguments)
    assert {f: sha256_of(f) for f in sorted(path.rglob("*")) if f.is_file()} == before


def test_a_changed_graph_is_refused_before_building(rtx, small, tmp_path):
    path = copy_bundle(small, tmp_path / "bundle")
    with (path / "model.onnx").open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match="expected sha256"):
        build(path, backend=RTX)


def test_a_bundle_that_goes_while_it_is_built_is_no_fault_of_its_graph(
    rtx, small, tmp_path, monkeypatch
):
    path = copy_bundle(small, tmp_path / "bundle")

    def gone(graph, *arguments):
        path.rename(tmp_path / "elsewhere")
        raise PlanError("the parser found no model.onnx.data")

    monkeypatch.setattr("hhdeploy.building.engine_from_onnx", gone)
    with pytest.raises(ConflictError, match="bundle was changed, moved or removed by another"):
        build(path, backend=RTX)


def test_a_graph_that_fails_parity_is_not_added(small, tmp_path, monkeypatch):
    path = copy_bundle(small, tmp_path / "bundle")
    before = (path / MANIFEST).read_bytes()
    strict = replace(PARITY["twin", "float16"], range_error=0.0)
    monkeypatch.setitem(PARITY, ("twin", "float16"), strict)  # type: ignore[arg-type]
    with pytest.raises(ParityError, match="max abs error"):
        add_typed_graph(path, "float16")
    assert (path / MANIFEST).read_bytes() == before
    assert not list(path.glob("*float16*"))
    assert not list(path.glob(".*"))


def test_a_full_disk_while_adding_leaves_the_bundle(small, tmp_path):
    bundle = Bundle.open(copy_bundle(small, tmp_path / "bundle"))
    before = (bundle.path / MANIFEST).read_bytes()

    def save(target: Path) -> None:
        target.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(Exception, match="disk is full"):
        add_graph(bundle, "int8", save, lambda candidate: [])
    assert (bundle.path / MANIFEST).read_bytes() == before
    assert not list(bundle.path.glob("*int8*")) + list(bundle.path.glob(".*"))


def test_a_missing_graph_waits_no_longer_than_the_engine(small, monkeypatch):
    said = []

    def made(path, precision, **options):
        said.append(options["lock_timeout"])
        raise ParityError("enough")

    monkeypatch.setattr("hhdeploy.building.import_tensorrt", lambda backend: None)
    monkeypatch.setattr("hhdeploy.verifying.graphs.add_typed_graph", made)
    with pytest.raises(ParityError, match="enough"):
        build(small, backend=RTX, precision="float16", lock_timeout=0.5)
    assert said == [0.5]


def test_without_a_gpu_no_graph_is_made(small, monkeypatch):
    """It was made, verified and added to the bundle before the build was refused."""

    def none():
        raise DeviceError("no GPU")

    monkeypatch.setattr("hhdeploy.building.import_tensorrt", lambda backend: None)
    monkeypatch.setattr("hhdeploy.runtime.cuda.find_gpu", none)
    monkeypatch.setattr(
        "hhdeploy.verifying.graphs.add_typed_graph", lambda *args, **options: pytest.fail("made")
    )
    assert "bfloat16" not in Bundle.open(small).manifest.graphs
    with pytest.raises(DeviceError, match="no GPU"):
        build(small, backend="tensorrt", precision="bfloat16")


def test_options_are_as_the_manifest_has_them():
    """Lists and NumPy's numbers; an engine was built before it could not be entered with them."""
    given = BuildOptions(
        [1, np.int64(2), 3], np.int64(9), ["sm89", "sm89"], workspace_mib=np.int8(4)
    )
    assert given == BuildOptions((1, 2, 3), 9, ("sm89",), workspace_mib=4)
    assert json.dumps([given.batch, given.max_slots, given.workspace_mib]) == "[[1, 2, 3], 9, 4]"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"batch": 4}, "`batch`: expected numbers of images in a list or tuple, found int 4"),
        ({"batch": (1, 2)}, "`batch`: expected min, opt and max, found (1, 2)"),
        ({"batch": (1.0, 2, 3)}, "`batch`: expected 0 or more, a whole number, found 1.0"),
        ({"architectures": "sm89"}, "`architectures`: expected names in a list or tuple"),
        ({"max_slots": 9.5}, "`max_slots`: expected 1 or more, a whole number, found 9.5"),
    ],
)
def test_options_that_are_none_are_refused_before_anything_is_built(options, said):
    with pytest.raises(OptionError, match=re.escape(said)):
        BuildOptions(**options)
