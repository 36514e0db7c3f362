"""Plain files: what is none is an error that says what it is, and nothing waits for a pipe."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from hhdeploy.adapters.format import load_adapter
from hhdeploy.adapters.importers.keymap import mapped
from hhdeploy.adapters.labels import read_labels
from hhdeploy.bundle import Bundle, add_adapter, remove_adapter
from hhdeploy.bundle.hub import pull, push
from hhdeploy.cli import main
from hhdeploy.errors import AdapterError, BundleError, HhdeployError, ReadError
from hhdeploy.files.plain import open_plain, plain_files, read_few, read_plain
from hhdeploy.files.weights import files_of
from hhdeploy.files.writing import copied, copy_directory, os_errors, sha256_of
from tests.workshop import contents, copy_bundle

WITNESS = Path(__file__).parents[2] / "witnesses" / "v1"


@pytest.fixture
def bundle(tmp_path):
    return copy_bundle(WITNESS / "branches", tmp_path / "bundle")


@pytest.fixture
def adapter(tmp_path):
    return Path(shutil.copytree(WITNESS / "rival", tmp_path / "rival"))


def in_its_place(path: Path, what: str) -> None:
    path.unlink()
    if what == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


@pytest.mark.parametrize("what", ["a pipe", "a directory"])
@pytest.mark.parametrize("read", [open_plain, read_plain, sha256_of])
def test_what_it_is_is_said(tmp_path, read, what):
    (tmp_path / "a").touch()
    in_its_place(tmp_path / "a", what)
    with pytest.raises(OSError, match=f"it is {what}; a plain file was expected") as caught:
        read(tmp_path / "a")
    assert caught.value.filename == str(tmp_path / "a")
    with pytest.raises(OSError, match=f"it is {what}"):
        copied(tmp_path / "a", tmp_path / "b")


def test_a_device_is_none():
    with pytest.raises(OSError, match="it is a device"):
        read_plain(Path("/dev/null"))


def test_what_holds_little_is_not_read_without_end(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_few(tmp_path / "a", 5) == read_few(tmp_path / "a", 5, plain=True) == b"12345"
    for path, most in ((tmp_path / "a", 4), (Path("/dev/zero"), 1 << 16)):
        with pytest.raises(OSError, match=f"it holds more than {most:,} bytes") as caught:
            read_few(path, most)
        assert caught.value.filename == str(path)


def test_a_pipe_is_taken_from_a_shell_but_not_waited_for_by_who_may_not(tmp_path):
    read, write = os.pipe()
    with open(write, "wb") as stream:
        stream.write(b"secret")
    assert read_few(Path(f"/dev/fd/{read}"), 6) == b"secret"
    os.close(read)
    os.mkfifo(tmp_path / "pipe")  # which nobody will write into
    with pytest.raises(OSError, match="it is a pipe; a plain file was expected"):
        read_few(tmp_path / "pipe", 6, plain=True)


@pytest.fixture
def endless(tmp_path):
    path = tmp_path / "endless.txt"
    path.symlink_to("/dev/zero")
    return path


@pytest.mark.parametrize(
    "arguments",
    [
        ("sign", "{bundle}", "--key", "{endless}"),
        ("sign", "{bundle}", "--key", "{out}", "--password-file", "{endless}"),
        ("verify", "{bundle}", "--signature", "--public-key", "{endless}"),
        ("serve", "{bundle}", "--inference-token-file", "{endless}"),
        ("serve", "{bundle}", "--allow-adapter-loading", "--token-file", "{endless}"),
        ("serve", "{bundle}", "--tls-cert", "{endless}", "--tls-key", "{endless}"),
    ],
    ids=lambda arguments: f"{arguments[0]} {arguments[-2]}",
)
def test_files_of_options_are_not_read_without_end(
    tmp_path, bundle, endless, monkeypatch, arguments
):
    """A link to a device in their place, as a wrong mount leaves it, ends in an error."""
    places = {"bundle": bundle, "endless": endless, "out": tmp_path / "out"}
    monkeypatch.setattr("hhdeploy.runtime.serving.logs.log_as_json", lambda level: None)
    result = CliRunner().invoke(main, [each.format(**places) for each in arguments])
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.output
    assert str(endless) in result.stderr and "it holds more than" in result.stderr


@pytest.mark.parametrize(
    "read",
    [lambda path: read_labels(path, path.parent), lambda path: mapped({}, path, path), files_of],
)
def test_lists_and_tables_are_not_read_without_end(endless, read):
    with pytest.raises((HhdeployError, OSError), match="it holds more than"):
        read(endless.rename(endless.with_name("endless.index.json")))


def test_a_directory_s_plain_files(tmp_path):
    place = tmp_path / "place"
    (place / "deep").mkdir(parents=True)
    (place / "deep" / "a").write_text("a")
    (place / "file").symlink_to("deep/a")
    (place / "dangling").symlink_to("nowhere")
    (place / "self").symlink_to(".")
    os.mkfifo(place / "pipe")
    assert plain_files(place) == ["deep/a", "file"]
    copy_directory(place, tmp_path / "copy")
    assert contents(tmp_path / "copy") == {"deep/a": b"a", "file": b"a"}


@pytest.mark.parametrize("what", ["a pipe", "a directory"])
@pytest.mark.parametrize(
    "name", ["model.onnx", "parity.json", "adapters/alpha/adapter_config.json"]
)
def test_a_bundle_s_file_that_is_none(bundle, tmp_path, name, what):
    in_its_place(bundle / name, what)
    said = rf"{name} cannot be read: it is {what}; a plain file was expected"
    opened = Bundle.open(bundle)
    for work in (
        opened.check_files,
        lambda: opened.read(name),
        lambda: push(bundle, tmp_path / "pushed"),
        lambda: pull(bundle, tmp_path / "pulled"),
    ):
        with pytest.raises(BundleError, match=said):
            work()


@pytest.mark.parametrize("what", ["a pipe", "a directory"])
def test_a_manifest_that_is_none(bundle, what):
    in_its_place(bundle / "hhdeploy.json", what)
    with pytest.raises(BundleError, match=f"hhdeploy.json cannot be read: .*it is {what}"):
        Bundle.open(bundle)


@pytest.mark.parametrize("what", ["a pipe", "a directory"])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_an_adapter_s_file_that_is_none(adapter, name, what):
    in_its_place(adapter / name, what)
    with pytest.raises(AdapterError, match=f"{name} .*it is {what}"):
        load_adapter(adapter)


def test_what_is_no_file_beside_an_adapter_is_left_out(bundle, adapter):
    os.mkfifo(adapter / "control")
    os.mkfifo(adapter / "README.md")
    (adapter / "old").symlink_to("/nowhere")
    add_adapter(bundle, "guest", adapter)
    assert contents(bundle / "adapters" / "guest") == contents(WITNESS / "rival")


def test_what_is_hidden_beside_an_adapter_is_left_out(bundle, adapter):
    """That of a clone names where it is from, at times with a password."""
    for name in (".git/config", ".git/objects/ab/c", ".DS_Store", "deep/.cache/x"):
        (adapter / name).parent.mkdir(parents=True, exist_ok=True)
        (adapter / name).write_text("https://me:secret@example.org/adapter")
    add_adapter(bundle, "guest", adapter)
    assert contents(bundle / "adapters" / "guest") == contents(WITNESS / "rival")
    copy_directory(adapter, bundle.parent / "copy")  # as an export does
    assert contents(bundle.parent / "copy") == contents(WITNESS / "rival")


def test_a_name_that_no_repository_takes_is_refused(bundle, adapter):
    (adapter / "a\\b").touch()
    before = contents(bundle)
    with pytest.raises(AdapterError, match="expected a name without a backslash"):
        add_adapter(bundle, "guest", adapter)
    assert contents(bundle) == before


def test_a_bundle_in_the_adapter_that_it_is_to_have_is_refused(adapter):
    inside = copy_bundle(WITNESS / "branches", adapter / "onnx")
    with pytest.raises(AdapterError, match=r"onnx is in the adapter's directory .*rival"):
        add_adapter(inside, "guest", adapter)


@pytest.mark.parametrize("work", [remove_adapter, lambda path, name: Bundle.open(path)])
def test_a_bundle_s_path_that_cannot_be(tmp_path, work):
    (tmp_path / "loop").symlink_to("loop")
    for path in (tmp_path / ("n" * 300), tmp_path / "loop"):
        with pytest.raises(HhdeployError, match=r"cannot be read: .*(too long|Too many levels)"):
            work(path, "alpha")


def test_a_file_that_the_system_refuses_is_a_message(monkeypatch, capsys, bundle):
    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied", "/srv/x")

    monkeypatch.setattr(Bundle, "open", refused)
    with pytest.raises(SystemExit):
        main(["adapter", "list", str(bundle)])
    assert capsys.readouterr().err.startswith("Error: /srv/x: Permission denied. See that")


@pytest.mark.parametrize("command", ["push", "pull", "add", "sha256", "copy", "read"])
def test_a_disk_that_fails_while_a_file_is_read_is_told_of_that_file(
    bundle, adapter, tmp_path, command
):
    """It was told of what is written meanwhile, which may be on another disk."""
    bad = {"add": adapter / "adapter_model.safetensors"}.get(command, bundle / "model.onnx.data")
    bad.unlink()
    bad.symlink_to("/proc/self/mem")  # a plain file, whose first page cannot be read
    work = {
        "push": lambda out: push(bundle, out),
        "pull": lambda out: pull(bundle, out),
        "add": lambda out: add_adapter(bundle, "rival", adapter),
        "sha256": lambda out: sha256_of(bad),
        "copy": lambda out: copied(bad, out),
        "read": lambda out: read_plain(bad),
    }[command]
    out = tmp_path / "out"
    with pytest.raises(ReadError, match=rf"Could not read {bad}, .*Input/output"), os_errors(out):
        work(out)
    assert "rival" not in [a.name for a in Bundle.open(bundle).manifest.adapters]
