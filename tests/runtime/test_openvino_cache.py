"""Compiled models on disk: found again, never stale, never trusted when damaged."""

from __future__ import annotations

import json
import os
import shutil
from functools import partial

import numpy as np
import pytest

from hhdeploy.errors import BundleError, PlanError
from hhdeploy.files.caches import CacheWarning, entry_at
from hhdeploy.files.writing import sha256_of
from hhdeploy.runtime import open_session, openvino_backend
from hhdeploy.runtime.openvino_cache import blob_entry, map_blob, write_blob
from tests.support import images
from tests.workshop import copy_bundle

openvino = pytest.importorskip("openvino")

started = partial(open_session, device="openvino", threads=1)


def blobs(cache):
    return sorted((cache / "openvino").glob("*"))


@pytest.fixture
def no_compiler(monkeypatch):
    """OpenVINO loads blobs only."""

    class Core:
        def __init__(self):
            self.get_property = core.get_property
            self.import_model = core.import_model
            self.read_model = core.read_model

        def compile_model(self, *given):
            raise RuntimeError("compiled after all")

    core = openvino_backend.shared_core()
    return lambda: monkeypatch.setattr(openvino_backend, "shared_core", Core)


def answer(path, names="alpha", **options):
    with started(path, **options) as session:
        return session.run(images(3), names)


def test_the_second_start_compiles_nothing(small, cache, no_compiler):
    first = answer(small)
    assert len(blobs(cache)) == 1
    no_compiler()
    assert np.array_equal(answer(small), first)
    with pytest.raises(BundleError, match="compiled after all"):
        answer(small, cache=None)
    with started(small, slots=4) as session:  # the bank is the session's own
        row = session.adapters["alpha"].row
        session.adapters.rows[row] = session.adapters.rows[session.adapters["gamma"].row]
        changed = session.run(images(3), "alpha")
    assert np.array_equal(changed, answer(small, "gamma"))
    assert not np.array_equal(changed, first)


def test_a_single_image_s_own_model_is_kept_too(small, cache, no_compiler):
    """Slots are one of its fixed dimensions, so a blob belongs to their number."""
    x = images(1)
    with started(small, slots=4) as session:
        first = session.run(x, "alpha")
    assert len(blobs(cache)) == 2
    with started(small, slots=5) as session:
        assert np.array_equal(session.run(x, "alpha"), first)
    assert len(blobs(cache)) == 3
    no_compiler()
    for slots in (4, 5):
        with started(small, slots=slots) as session:
            assert np.array_equal(session.run(x, "alpha"), first)
            assert session._backend._one is not None


def test_no_cache_writes_nothing(small, cache, tmp_path):
    answer(small, cache=None)
    assert not cache.exists()
    answer(small, cache=tmp_path / "mine")
    assert len(blobs(tmp_path / "mine")) == 1
    assert not cache.exists()


def test_every_option_has_a_blob_of_its_own(small, cache):
    answer(small)
    answer(small, threads=2)
    answer(small, threads=2, hint="throughput")
    assert len(blobs(cache)) == 3


def change_weights(path):
    """Other weights that the manifest agrees with, in files of the same size and time."""
    data = path / "model.onnx.data"
    before = data.stat()
    weights = np.fromfile(data, np.float32) * np.float32(0.5)
    data.write_bytes(weights.tobytes())
    os.utime(data, ns=(before.st_atime_ns, before.st_mtime_ns))
    manifest = json.loads((path / "hhdeploy.json").read_text())
    manifest["files"][data.name] = sha256_of(data)
    return manifest


def test_a_changed_graph_never_meets_an_old_blob(small, cache, tmp_path):
    path = copy_bundle(small, tmp_path / "b")
    before = answer(path)
    manifest = change_weights(path)
    with pytest.raises(BundleError, match="expected sha256"):  # and a blob does not hide it
        answer(path)
    (path / "hhdeploy.json").write_text(json.dumps(manifest))
    changed = answer(path)
    assert not np.array_equal(changed, before)
    assert np.array_equal(changed, answer(path, cache=None))
    assert len(blobs(cache)) == 2


def test_another_version_never_meets_an_old_blob(small, cache, monkeypatch):
    answer(small)
    monkeypatch.setattr(openvino, "get_version", lambda: "9999.1")
    answer(small)
    assert len(blobs(cache)) == 2


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "none"])
def test_a_damaged_blob_is_compiled_again(small, cache, no_compiler, damage):
    first = answer(small)
    (blob,) = blobs(cache)
    stored = blob.read_bytes()
    middle = len(stored) // 2
    damaged = {
        "cut": stored[:middle],
        "flipped": stored[:middle] + bytes([stored[middle] ^ 1]) + stored[middle + 1 :],
        "empty": b"",
        "none": stored[:3],
    }[damage]
    blob.write_bytes(damaged)
    assert np.array_equal(answer(small), first)
    no_compiler()
    assert np.array_equal(answer(small), first)


def test_a_blob_that_openvino_refuses_is_compiled_again(small, cache):
    first = answer(small)
    (blob,) = blobs(cache)
    entry = entry_at(cache, "openvino", blob.name)
    write_blob(entry, memoryview(b"whole, but no model" * 99))
    assert map_blob(entry) is not None
    assert np.array_equal(answer(small), first)
    assert blob.stat().st_size > 99 * 19 + 4


def test_a_cache_that_cannot_be_written_is_left_out(small, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    with pytest.warns(CacheWarning, match="is used, and not kept"):
        found = answer(small, cache=file)
    assert np.array_equal(found, answer(small, cache=None))
    assert file.read_bytes() == b""


def test_a_blob_may_go_while_it_is_used(small, cache):
    first = answer(small)
    with started(small) as session:
        shutil.rmtree(cache)
        assert np.array_equal(session.run(images(3), "alpha"), first)


def test_models_used_longest_ago_make_room(small, cache, no_compiler, monkeypatch):
    answer(small)
    (blob,) = blobs(cache)
    monkeypatch.setenv("HHDEPLOY_CACHE_LIMIT", str(int(2.5 * blob.stat().st_size)))
    answer(small, threads=2)
    os.utime(blob, (1, 1))
    answer(small, threads=2)  # used, not stored
    answer(small, threads=3)
    assert len(blobs(cache)) == 2
    assert blob not in blobs(cache)
    monkeypatch.setenv("HHDEPLOY_CACHE_LIMIT", "1kB")
    answer(small)  # larger than the limit: not kept
    assert len(blobs(cache)) == 2
    no_compiler()
    answer(small, threads=3)
    with pytest.raises(BundleError, match="compiled after all"):
        answer(small)


def test_a_blob_that_goes_while_it_is_read_is_compiled_again(small, cache, monkeypatch):
    first = answer(small)
    (blob,) = blobs(cache)
    memmap = np.memmap

    def gone(file, *arguments, **options):
        blob.unlink(missing_ok=True)
        return memmap(file, *arguments, **options)

    monkeypatch.setattr(np, "memmap", gone)
    assert np.array_equal(answer(small), first)
    assert blob.is_file()


def test_what_is_mapped_stays_when_the_entry_goes(tmp_path):
    entry = blob_entry(tmp_path, "a")
    write_blob(entry, memoryview(b"some" * 5000))
    mapped = map_blob(entry)
    entry.path.unlink()
    assert mapped.tobytes() == b"some" * 5000
    assert map_blob(entry) is None


def test_a_limit_that_is_no_size(small, cache, monkeypatch):
    monkeypatch.setenv("HHDEPLOY_CACHE_LIMIT", "plenty")
    with pytest.raises(PlanError, match="HHDEPLOY_CACHE_LIMIT"):
        answer(small)
    assert not cache.exists()
