"""hhdeploy cache list | clear, and the commands that can do without a cache."""

from __future__ import annotations

import os
import re
from datetime import datetime

import pytest
from PIL import Image

from hhdeploy.errors import SessionError
from hhdeploy.files.caches import KINDS, entry_at, key_of
from hhdeploy.loadtest import run
from hhdeploy.runtime import session
from hhdeploy.runtime.serving.settings import ServeSettings


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A cache with 1.5 kB of kernels, used last, and 3 kB of a backbone."""
    root = tmp_path / "cache"
    monkeypatch.setenv("HHDEPLOY_CACHE", str(root))
    kernels = entry_at(root, "kernels", f"{key_of('k')}.bin")
    base = entry_at(root, "base", key_of("b"))
    with kernels.store() as made:
        made.write_bytes(b"x" * 1500)
    with base.store() as made:
        made.mkdir()
        (made / "model.onnx").write_bytes(b"x" * 3000)
    os.utime(base.path, (1, 1))
    return root


# --- list ---------------------------------------------------------------------------------------


def test_list_as_json(succeed_json, root, monkeypatch):
    monkeypatch.setenv("HHDEPLOY_CACHE_LIMIT", "2GB")
    found = succeed_json("cache", "list")
    entries = found.pop("entries")
    assert found == {"directory": str(root), "limit_bytes": 2 * 10**9, "total_bytes": 4500}
    assert [(e["kind"], e["entry"], e["bytes"]) for e in entries] == [
        ("kernels", f"{key_of('k')}.bin", 1500),
        ("base", key_of("b"), 3000),
    ]
    assert datetime.fromisoformat(entries[1]["last_use"]).timestamp() == 1


def test_list_for_people(succeed, root):
    text = succeed("cache", "list")
    kernels, base = (
        re.search(rf"^{kind} +{key_of(key)[:12]} +(\S+ kB) +\d{{4}}-", text, re.M)
        for kind, key in (("kernels", "k"), ("base", "b"))
    )
    assert (kernels[1], base[1]) == ("1.5 kB", "3.0 kB")
    assert kernels.start() < base.start()
    assert f"4.5 kB of 10.0 GB (HHDEPLOY_CACHE_LIMIT) in {root}" in text


def test_list_of_another_directory_that_is_not_there(succeed, succeed_json, root, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    assert succeed_json("cache", "list", "--cache-dir", elsewhere)["entries"] == []
    assert "0 B of" in succeed("cache", "list", "--cache-dir", elsewhere)
    assert not elsewhere.exists()


def test_a_limit_that_is_no_size(refuse, root, monkeypatch):
    monkeypatch.setenv("HHDEPLOY_CACHE_LIMIT", "plenty")
    assert "HHDEPLOY_CACHE_LIMIT: expected a size" in refuse("cache", "list")


# --- clear --------------------------------------------------------------------------------------


def test_clear_one_kind_then_all(succeed, succeed_json, root):
    removed = succeed_json("cache", "clear", "base", "openvino")
    assert (removed["directory"], removed["freed_bytes"]) == (str(root), 3000)
    assert [e["kind"] for e in removed["removed"]] == ["base"]
    assert [e["kind"] for e in succeed_json("cache", "list")["entries"]] == ["kernels"]
    assert f"Removed 1 entry from {root}: 1.5 kB" in succeed("cache", "clear")
    assert f"Removed 0 entries from {root}: 0 B" in succeed("cache", "clear")


def test_clear_of_a_kind_that_there_is_not(call, root):
    result = call("cache", "clear", "models")
    assert result.exit_code == 2
    assert all(kind in result.stderr for kind in KINDS)


# --- commands that open a session ---------------------------------------------------------------


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.new("RGB", (40, 32), (200, 30, 90)).save(path)
    return path


@pytest.fixture(params=["predict", "bench"])
def arguments(request, small, picture):
    """Of a command that opens a session and keeps what OpenVINO compiles for it."""
    pytest.importorskip("openvino")
    flags = "--device openvino --threads 1".split()
    if request.param == "predict":
        return ["predict", small, picture, *flags]
    # Several images: for a single one OpenVINO compiles another model as well.
    return ["bench", small, "--against", small, "--batch", 3, "--runs", 2, *flags]


def test_compiled_models_are_kept_where_it_is_said(succeed, arguments, tmp_path, monkeypatch):
    default, mine = tmp_path / "default", tmp_path / "mine"
    monkeypatch.setenv("HHDEPLOY_CACHE", str(default))
    succeed(*arguments, "--no-cache")
    assert not default.exists()
    succeed(*arguments, "--cache-dir", mine)
    assert len(list((mine / "openvino").iterdir())) == 1
    assert not default.exists()
    succeed(*arguments)
    assert len(list((default / "openvino").iterdir())) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["predict", "OUT", "a.png"],
        ["bench", "OUT"],
        ["serve", "OUT"],
        ["serve", "OUT", "--ray"],
        ["export", "OUT", "--model", "m", "--adapter", "a"],
        ["calibrate", "OUT", "--data", "images"],
    ],
)
def test_one_cannot_have_it_both_ways(call, command, tmp_path):
    result = call(*command, "--no-cache", "--cache-dir", tmp_path / "c")
    assert result.exit_code == 2
    assert "exclude each other" in result.stderr


GIVEN = [([], "default"), (["--no-cache"], None), (["--cache-dir", "mine"], "mine")]


@pytest.mark.parametrize(("flags", "cache"), GIVEN)
def test_the_server_s_session(refuse, small, monkeypatch, flags, cache):
    given = []

    def stop(path, **options):
        given.append(options["cache"])
        raise SessionError("as far as it goes here")

    monkeypatch.setattr(session, "open_session", stop)
    refuse("serve", small, *flags)
    assert [c and str(c) for c in given] == [cache]


@pytest.mark.parametrize(("flags", "cache"), GIVEN)
def test_the_server_that_is_tested_under_load(refuse, small, monkeypatch, flags, cache):
    commands = []

    def stop(command, log):
        commands.append(command)
        raise SessionError("as far as it goes here")

    monkeypatch.setattr(run, "running_server", stop)
    load = "--serve --device cpu --threads 1 --adapters 2 --requests 1".split()
    refuse("bench", small, *load, "--json", *flags)
    (command,) = commands
    assert [x for x in command if x in ("--no-cache", "--cache-dir", "mine")] == flags


def test_the_sessions_of_replicas(tmp_path):
    assert ServeSettings(tmp_path).session_options()["cache"] == "default"
    assert ServeSettings(tmp_path, no_cache=True).session_options()["cache"] is None
    assert ServeSettings(tmp_path, cache_dir=tmp_path).session_options()["cache"] == tmp_path
