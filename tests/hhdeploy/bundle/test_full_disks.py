"""Real file systems that are full: every writer says so, and leaves what was there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hhdeploy.bundle import add_adapter
from hhdeploy.errors import WriteError
from tests.hhdeploy.bundle.test_crashes import WITNESS, WRITERS
from tests.workshop import contents, small_disk


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MiB."""
    with small_disk(tmp_path / "disk", "4m") as place:
        yield place


def leave_free(disk: Path, kib: int) -> None:
    (disk / "fill").write_bytes(b"\0" * (shutil.disk_usage(disk).free - kib * 1024))


def said_of(write: Callable[[Path], object], path: Path) -> str | None:
    """The error's message, None without one."""
    try:
        write(path)
    except WriteError as error:
        return str(error)
    return None


@pytest.mark.parametrize("writer", [w for w in WRITERS if w != "add after an edit"])
def test_at_every_stage_of_an_edit(writer, disk):
    name, write = WRITERS[writer]
    refused = 0
    for kib in (0, 8, 24, 48, 96, 192):
        path = Path(shutil.copytree(WITNESS / name, disk / "bundle"))
        before = contents(path)
        leave_free(disk, kib)
        said = said_of(write, path)
        if said is not None:
            assert "The disk is full" in said
            assert contents(path) == before
            assert {p.name for p in path.iterdir()} == {n.split("/")[0] for n in before}
            refused += 1
        (disk / "fill").unlink()
        add_adapter(path, "next", WITNESS / "rival")
        shutil.rmtree(path)
    assert refused, "the disk was never full"


@pytest.mark.parametrize(
    ("there", "fold", "kib"),
    [
        *((False, False, kib) for kib in (0, 40, 200, 280)),
        *((True, False, kib) for kib in (40, 280)),
        *((False, True, kib) for kib in (0, 200)),
    ],
)
def test_an_export(disk, workshop, kib, there, fold):
    path = disk / "bundle"
    if there:
        shutil.copytree(WITNESS / "folded", path)
    before = contents(disk)
    leave_free(disk, kib)
    with pytest.raises(WriteError, match="The disk is full"):
        workshop.export(path, ("alpha",), overwrite=True, fold=fold)
    (disk / "fill").unlink()
    assert contents(disk) == before
    assert {p.name for p in disk.iterdir()} == ({"bundle"} if there else set())
    workshop.export(path, ("alpha",), overwrite=True, fold=fold, verify=False)
