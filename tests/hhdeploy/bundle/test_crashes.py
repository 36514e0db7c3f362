"""Every writer of a bundle, killed at every file-system call and cut off from power.

Whatever remains opens, its hashes hold, and it is the old bundle or the new one: never half of
one, never another. Graph, engine and calibration are made once and handed in.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest

# A writer would import it in every process that is killed.
import hhdeploy.exporters.writer  # noqa: F401
from hhdeploy.building import _enter
from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.bundle.engines import engine_name
from hhdeploy.bundle.locking import BUNDLE, LOCK, locked
from hhdeploy.bundle.manifest import EngineEntry, Manifest
from hhdeploy.bundle.signing import check_signature, sign
from hhdeploy.bundle.store import Basis, edit
from hhdeploy.errors import BundleError, ConflictError
from hhdeploy.files.directories import atomic_directory
from hhdeploy.files.journal import JOURNAL
from hhdeploy.files.tensors import read_tensors, tensor_bytes
from hhdeploy.parity import ParityReport, StageResult, compare
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import _store_verification
from hhdeploy.verifying.graphs import commit_graph, graph_on_trial
from hhdeploy.verifying.reference import Reference
from tests.crashing import calls_of, deaths, killed_at_every_call, power_cuts
from tests.hhdeploy.bundle.test_signing import pair
from tests.support import assert_parity
from tests.workshop import copy_bundle

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"
IMAGES, RIVAL = (
    read_tensors(WITNESS / "added.safetensors", AssertionError)[0][key]
    for key in ("images", "float32/rival")
)
KNOWN, _ = read_tensors(WITNESS / "branches.safetensors", AssertionError)


def calibrated(root: Path) -> None:
    """The INT8 graph of the witness and its files join the bundle."""
    source = WITNESS / "int8"

    def save(target: Path) -> None:
        shutil.copy(source / "model.int8.onnx", target)
        shutil.copy(source / "model.int8.onnx.data", f"{target}.data")

    extras = {
        name: (lambda target, name=name: shutil.copy(source / name, target))
        for name in ("calibration.int8.json", "calibration.int8.safetensors")
    }
    bundle = Bundle.open(root)
    with graph_on_trial(bundle, "int8", save) as trial:
        commit_graph(bundle, trial, "int8", [], extras)


def built(root: Path) -> None:
    """An engine joins the bundle."""
    manifest = Bundle.open(root).manifest
    name = engine_name("float32", "tensorrt-rtx", ("sm89",))
    plan = memoryview(bytes(range(256)) * 40)
    entry = EngineEntry(
        name, "tensorrt-rtx", "1", "float32", ("sm89",), None, (1, 1, 1), (1, 3, 8), None,
        manifest.graph_digest("float32"), None, 1.0, plan.nbytes,
    )  # fmt: skip
    with edit(root, Basis.of(manifest)) as change:
        _enter(change, name, entry, plan)


def verified(root: Path) -> None:
    """A new reference and its report join the bundle."""
    bundle = Bundle.open(root)
    reference = Reference(*bundle.reference())
    moved = replace(reference, images=reference.images[::-1].copy())
    figures = compare(reference.logits, reference.logits)
    stages = [StageResult.of("branches", "float32", "none", "alpha", figures)]
    report = ParityReport(bundle.parity()["data"], stages)
    basis = Basis.of(bundle.manifest)
    with edit(root, basis) as change:
        _store_verification(change, basis, moved, report)


def replaced(root: Path) -> None:
    """`export --overwrite`: another bundle in its place."""
    with atomic_directory(root, overwrite=True, kind=BUNDLE) as scratch:
        shutil.copytree(WITNESS / "added", scratch, dirs_exist_ok=True)


def replaced_in(place: Path) -> None:
    """The same, of the bundle in a directory."""
    replaced(place / "bundle")


def added(root: Path) -> None:
    """An adapter joins the bundle."""
    add_adapter(root, "guest", WITNESS / "rival")


def removed(root: Path) -> None:
    """An adapter leaves it."""
    remove_adapter(root, "rival")


def signed_again(root: Path) -> None:
    """A bundle is signed, by a key that lies beside it."""
    sign(root, root.parent / "key.pem")


def careless(root: Path) -> None:
    """A planted mistake: the manifest before the bank."""
    with edit(root) as change:
        bank = change.bundle.bank().copy()
        bank[1] = 0
        name = change.store("bank.safetensors", tensor_bytes({"adapter_bank": bank}))
        content = (root / name).read_bytes()
        (root / name).unlink()
        change.commit()
        (root / name).write_bytes(content)


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "add": ("branches", added),
    "add after an edit": ("edited", added),
    "remove": ("added", removed),
    "calibrate": ("branches", calibrated),
    "calibrate again": ("int8", calibrated),
    "build": ("branches", built),
    "verify": ("added", verified),
}


def origin_of(name: str, tmp_path: Path) -> Path:
    """A witness; "edited" has an old version of its bank in ``.old``."""
    root = Path(shutil.copytree(WITNESS / ("added" if name == "edited" else name), tmp_path / "o"))
    if name == "edited":
        remove_adapter(root, "rival")
    return root


class Judge:
    """Looks at what a crash left, and remembers what it saw.

    Attributes:
        points: how many crashes.
        ends: the distinct bundles that they left.
    """

    def __init__(self, old: Manifest, new: Manifest) -> None:
        self.points, self.ends = 0, []
        self._allowed = (old, new)

    def look(self, root: Path) -> None:
        self.points += 1
        bundle = Bundle.open(root)
        bundle.check_files()
        assert bundle.manifest in self._allowed, "neither the old bundle nor the new one"
        there = {p.relative_to(root).as_posix() for p in (root / "adapters").glob("*/*")}
        assert there - set(bundle.manifest.files) <= journalled(root), (
            "nobody knows whose these are"
        )
        if bundle.manifest not in self.ends:
            self.ends.append(bundle.manifest)
            answers(bundle)

    def look_at_all(self, roots: Iterable[Path]) -> None:
        for root in roots:
            self.look(root)


def journalled(root: Path) -> set[str]:
    """What the next edit removes."""
    with contextlib.suppress(FileNotFoundError, ValueError):  # of a power cut: not whole
        return set(json.loads((root / JOURNAL).read_bytes()))
    return set()


def answers(bundle: Bundle) -> None:
    """In full: every graph answers, every adapter as it should."""
    for precision in bundle.manifest.graphs:
        with open_session(bundle.path, device="cpu", precision=precision, threads=1) as session:
            for adapter in session.adapters:
                stage = ("branches", "float32") if precision == "float32" else ("quantised", "int8")
                known = KNOWN.get(f"float32/{adapter}", RIVAL)
                assert_parity(known, session.run(IMAGES, adapter), *stage)


def judged(name: str, write: Callable[[Path], object], tmp_path: Path) -> tuple[Path, list, Judge]:
    origin = origin_of(name, tmp_path)
    done = Path(shutil.copytree(origin, tmp_path / "done"))
    calls = calls_of(write, done)
    judge = Judge(Bundle.open(origin).manifest, Bundle.open(done).manifest)
    assert judge._allowed[0] != judge._allowed[1]
    return origin, calls, judge


@pytest.mark.parametrize("writer", WRITERS)
def test_killed_at_every_call(writer, tmp_path):
    """The others commit as `add` does, and a power cut at each of their calls leaves no less."""
    name, write = WRITERS[writer]
    step = 1 if writer == "add" else 3
    origin, calls, judge = judged(name, write, tmp_path)
    judge.look_at_all(killed_at_every_call(write, origin, tmp_path, step))
    print(f"{writer}: {judge.points} points")
    assert len(judge.ends) == 2, "crashes before and after the commit"
    assert judge.points == len(deaths(calls)[::step]) > len(calls) // (2 * step)


@pytest.mark.parametrize("writer", WRITERS)
def test_power_cut_at_every_call(writer, tmp_path):
    name, write = WRITERS[writer]
    origin, calls, judge = judged(name, write, tmp_path)
    judge.look_at_all(power_cuts(calls, origin, tmp_path))
    print(f"{writer}: {judge.points} points")
    assert len(judge.ends) == 2, "power cuts before and after the commit"
    assert judge.points > len(calls) // 2
    for root in power_cuts(calls, origin, tmp_path, after=True):
        assert Bundle.open(root).manifest == judge._allowed[1], "what was said to be done is lost"


@pytest.mark.parametrize("writer", WRITERS)
def test_the_next_edit_leaves_nothing_of_a_crash(writer, tmp_path):
    name, write = WRITERS[writer]
    origin, _, _ = judged(name, write, tmp_path)
    for root in killed_at_every_call(write, origin, tmp_path, step=5):
        add_adapter(root, "next", WITNESS / "rival")
        there = {
            p.relative_to(root).as_posix()
            for p in root.rglob("*")
            if p.is_file() and ".old" not in p.parts
        }
        assert there == {*Bundle.open(root).manifest.files, "hhdeploy.json"}


def test_a_bundle_that_is_replaced_is_the_old_or_the_new_one(tmp_path):
    """Its directory is exchanged in one call; what is left of the old one is beside it."""
    place = tmp_path / "place"
    shutil.copytree(WITNESS / "branches", place / "bundle")
    old, new = (Bundle.open(WITNESS / name).manifest for name in ("branches", "added"))
    judge = Judge(old, new)
    for root in killed_at_every_call(replaced_in, place, tmp_path):
        judge.look(root / "bundle")
        replaced_in(root)
        assert [p.name for p in root.iterdir()] == ["bundle"], "the next export sweeps"
    assert len(judge.ends) == 2


@pytest.mark.parametrize("write", [added, signed_again])
@pytest.mark.parametrize("cut", [False, True])
def test_what_a_crash_leaves_is_signed_or_says_that_it_is_not(tmp_path, write, cut):
    """Never a signature of another version, nor one that leftovers make wrong."""
    key, public = pair(tmp_path)
    origin = origin_of("branches", tmp_path)
    with edit(origin) as change:  # so that it has a card
        change.manifest = replace(change.manifest, versions={"hhdeploy": "again"})
    sign(origin, key)
    old, ends = Bundle.open(origin).manifest, set()
    if cut:
        done = Path(shutil.copytree(origin, tmp_path / "done"))
        roots = power_cuts(calls_of(write, done), origin, tmp_path)
    else:
        roots = killed_at_every_call(write, origin, tmp_path)
    for root in roots:
        changed = Bundle.open(root).manifest != old
        ends.add(changed)
        if changed:
            with pytest.raises(BundleError, match="is not signed"):
                check_signature(root, public)
        else:
            check_signature(root, public)
    assert ends == ({False, True} if write is added else {False})


def test_the_harness_catches_a_writer_that_commits_first(tmp_path):
    origin, _, judge = judged("branches", careless, tmp_path)
    with pytest.raises(Exception, match="missing"):
        judge.look_at_all(killed_at_every_call(careless, origin, tmp_path))


def test_the_harness_catches_a_missing_fsync(tmp_path, monkeypatch):
    """A planted mistake: the directory is not synced before the manifest is replaced."""
    import hhdeploy.bundle.store

    monkeypatch.setattr(hhdeploy.bundle.store, "sync_directory", lambda path: None)
    name, write = WRITERS["add"]
    origin, calls, judge = judged(name, write, tmp_path)
    with pytest.raises(Exception, match="missing"):
        judge.look_at_all(power_cuts(calls, origin, tmp_path))


@pytest.mark.parametrize("sticky", [False, True])
def test_a_lock_that_another_users_process_left_is_taken(tmp_path, monkeypatch, sticky):
    bundle = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    (bundle / LOCK).touch()
    opened, unlink = os.open, os.unlink

    def refused(path, flags, *rest, **at):
        if path == LOCK and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, flags, *rest, **at)

    def kept(path, **at):
        if path == LOCK and sticky:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), path)
        unlink(path, **at)

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "unlink", kept)
    remove_adapter(bundle, "alpha")
    assert [a.name for a in Bundle.open(bundle).manifest.adapters] == ["gamma"]
    assert (bundle / LOCK).exists() == sticky


@pytest.mark.parametrize("number", [errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_lock_that_cannot_be_removed_is_no_failure_and_hides_none(tmp_path, monkeypatch, number):
    """A disk that fails makes itself read-only: the lock was all that the error spoke of, also
    where the change was made."""
    bundle, unlink = copy_bundle(WITNESS / "branches", tmp_path / "bundle"), os.unlink

    def refused(path, **at):
        if path == LOCK:
            raise OSError(number, os.strerror(number), path)
        unlink(path, **at)

    monkeypatch.setattr(os, "unlink", refused)
    with pytest.raises(BundleError, match="unknown adapter 'nobody'"):
        remove_adapter(bundle, "nobody")
    remove_adapter(bundle, "alpha")
    remove_adapter(bundle, "gamma")
    assert not Bundle.open(bundle).manifest.adapters


def test_anothers_lock_that_may_only_be_read_still_keeps_out(tmp_path, monkeypatch):
    bundle = copy_bundle(WITNESS / "branches", tmp_path / "bundle")
    opened = os.open

    def refused(path, flags, *rest, **at):
        if path == LOCK and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return opened(path, flags, *rest, **at)

    with locked(bundle):
        monkeypatch.setattr(os, "open", refused)
        with pytest.raises(ConflictError):
            remove_adapter(bundle, "alpha", lock_timeout=0)
