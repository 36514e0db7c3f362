"""Bundles in repositories of models: what is written, what is refused, and nothing half."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.bundle.hub import ATTRIBUTES, plan_of, pull, push
from hhdeploy.bundle.manifest import MANIFEST, OLD, SIGNATURE
from hhdeploy.bundle.signing import check_signature, sign
from hhdeploy.errors import (
    BundleError,
    ConflictError,
    MissingDependencyError,
    OptionError,
    ReadError,
    WriteError,
)
from hhdeploy.files.writing import copied, sha256_of
from hhdeploy.runtime import open_session
from hhdeploy.verifying.bundles import verify
from tests.hhdeploy.bundle.test_signing import pair
from tests.support import images
from tests.workshop import COMMAND_SECONDS, contents, copy_bundle, flip_byte


@pytest.fixture
def bundle(small, tmp_path, workshop) -> Path:
    """Changed once, so that it has an old version beside."""
    path = copy_bundle(small, tmp_path / "bundle")
    add_adapter(path, "rival", workshop.directory("rival"))
    assert (path / OLD).is_dir()
    (path / ".lock").touch()
    return path


def own(path):
    """A bundle's files, without what lies beside it."""
    return {n: c for n, c in contents(path).items() if not n.startswith((OLD, ".lock"))}


@pytest.mark.parametrize("address", [str, Path.as_uri])
def test_there_and_back(bundle, tmp_path, address):
    repository = tmp_path / "hub" / "me" / "my tasks, 100%25"
    plan = push(bundle, address(repository))
    written = contents(repository)
    assert written.pop(ATTRIBUTES) == plan.attributes.encode()
    assert written == own(bundle)
    assert set(plan.files) == set(written)
    assert {"README.md", MANIFEST} <= set(written)
    back = pull(address(repository), tmp_path / "back")
    assert contents(tmp_path / "back") == own(bundle)
    assert back.manifest == Bundle.open(bundle).manifest
    with open_session(back.path, device="cpu", threads=1) as session:
        session.run(images(1), "rival")


def test_what_was_pulled_is_found_wherever_one_goes(bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert pull(bundle, "back").path == tmp_path / "back"


def test_large_files_go_to_lfs(bundle, tmp_path):
    plan = plan_of(Bundle.open(bundle))
    all_files, *large = plan.attributes.splitlines()
    assert all_files == "* -text"
    suffixes = {line.split()[0].removeprefix("*") for line in large}
    assert all(line.endswith(" filter=lfs diff=lfs merge=lfs -text") for line in large)
    for name in plan.files:
        assert (Path(name).suffix in suffixes) == (name in plan.large)
        assert (Path(name).suffix in (".json", ".md")) == (name not in plan.large)


def test_a_clone_that_changes_ends_of_lines(bundle, tmp_path):
    """As Git for Windows does unless it is told otherwise."""
    if shutil.which("git") is None:
        pytest.skip("needs git")
    push(bundle, tmp_path / "hub")
    written = contents(tmp_path / "hub")
    git = ["git", "-C", str(tmp_path / "hub"), "-c", "core.autocrlf=true"]
    git += ["-c", "filter.lfs.clean=cat", "-c", "filter.lfs.smudge=cat"]
    for command in ("init -q", "add -A", "checkout-index -a --prefix=clone/"):
        subprocess.run([*git, *command.split()], check=True, timeout=COMMAND_SECONDS)
    assert contents(tmp_path / "hub" / "clone") == written


def test_a_file_system_that_takes_two_names_for_one(bundle, tmp_path, monkeypatch):
    """As if it knew no case: what is written to adapters/Alpha lies in adapters/alpha as well."""
    shutil.copytree(bundle / "adapters" / "alpha", tmp_path / "Alpha")
    add_adapter(bundle, "Alpha", tmp_path / "Alpha")
    monkeypatch.setattr("hhdeploy.bundle.hub.copied", _without_case)
    with pytest.raises(WriteError, match=r": adapters/alpha/adapter_config\.json: expected a"):
        pull(bundle, tmp_path / "pulled")
    assert not (tmp_path / "pulled").exists()


def _without_case(source, target):
    digest = copied(source, target)
    if "/adapters/Alpha/" in str(target):
        other = Path(str(target).replace("/Alpha/", "/alpha/"))
        other.parent.mkdir(exist_ok=True)
        copied(source, other)
    return digest


def test_a_clone_without_its_large_files(bundle, tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 7\n"
    (bundle / "model.onnx").write_text(pointer)
    for refuses in (lambda: verify(bundle), lambda: pull(bundle, tmp_path / "pulled")):
        with pytest.raises(BundleError, match=r"model\.onnx: expected sha256 .* git lfs pull"):
            refuses()


def test_a_dry_run_writes_nothing_and_finds_damage(bundle, tmp_path):
    plan = push(bundle, tmp_path / "x", dry_run=True)
    assert MANIFEST in plan.files
    assert not (tmp_path / "x").exists()
    flip_byte(bundle / "model.onnx.data")
    with pytest.raises(BundleError, match="expected sha256"):
        push(bundle, tmp_path / "x", dry_run=True)


def test_a_push_replaces_what_a_push_wrote_alone(bundle, tmp_path):
    repository = tmp_path / "hub"
    push(bundle, repository)
    with pytest.raises(WriteError, match="already exists"):
        push(bundle, repository)
    push(bundle, repository, overwrite=True)
    (repository / ".git").mkdir()
    (repository / ".git" / "HEAD").write_text("x")
    with pytest.raises(WriteError, match=r"it holds \.git/HEAD, which no bundle has"):
        push(bundle, repository, overwrite=True)


@pytest.mark.parametrize("direction", ["push", "pull"])
@pytest.mark.parametrize(
    "file", ["model.onnx.data", "README.md", "adapters/alpha/adapter_config.json"]
)
def test_a_damaged_file_leaves_nothing(bundle, tmp_path, file, direction):
    name = Bundle.open(bundle).manifest.named(file)
    out = tmp_path / "out"
    if direction == "push":
        flip_byte(bundle / name)
        with pytest.raises(BundleError, match="expected sha256"):
            push(bundle, out)
    else:
        push(bundle, tmp_path / "hub")
        flip_byte(tmp_path / "hub" / name)
        with pytest.raises(BundleError, match="expected sha256"):
            pull(tmp_path / "hub", out)
        (tmp_path / "hub" / name).unlink()
        with pytest.raises(BundleError, match="is missing"):
            pull(tmp_path / "hub", out)
    assert not out.exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".out")]


def test_what_lies_beside_stays_there(bundle, tmp_path):
    push(bundle, tmp_path / "hub")
    (tmp_path / "hub" / "evil.py").write_text("x")
    (tmp_path / "hub" / "adapters" / "alpha" / "evil.py").write_text("x")
    pull(tmp_path / "hub", tmp_path / "out")
    assert contents(tmp_path / "out") == own(bundle)


@pytest.mark.parametrize(
    "name",
    ["../evil", "/evil", "adapters/../../evil", "a//b", "./x", ".git/hooks/x", "a\\b", MANIFEST],
)
def test_a_manifest_names_nothing_outside(bundle, tmp_path, name):
    content = json.loads((bundle / MANIFEST).read_text())
    content["files"][name] = "0" * 64
    (bundle / MANIFEST).write_text(json.dumps(content))
    for run in (lambda: pull(bundle, tmp_path / "out"), lambda: push(bundle, tmp_path / "out")):
        with pytest.raises(BundleError, match="expected a path inside of the bundle"):
            run()
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "evil").exists()


def test_a_signature_comes_along_and_is_asked_for(bundle, tmp_path):
    key, public = pair(tmp_path)
    push(bundle, tmp_path / "unsigned")
    with pytest.raises(BundleError, match="is not signed"):
        pull(tmp_path / "unsigned", tmp_path / "out", public_key=public)
    (bundle / ".lock").unlink()
    sign(bundle, key)
    push(bundle, tmp_path / "hub")
    assert (tmp_path / "hub" / SIGNATURE).is_file()
    check_signature(pull(tmp_path / "hub", tmp_path / "good", public_key=public).path, public)
    # Whoever changes a file and its hash changes the manifest.
    card = tmp_path / "hub" / "README.md"
    manifest = tmp_path / "hub" / MANIFEST
    card.write_text("---\nlicense: mit\n---\n")
    content = json.loads(manifest.read_text())
    content["files"]["README.md"] = sha256_of(card)
    manifest.write_text(json.dumps(content))
    pull(tmp_path / "hub", tmp_path / "unasked")
    with pytest.raises(BundleError, match="is not what was signed"):
        pull(tmp_path / "hub", tmp_path / "out", public_key=public)
    assert not (tmp_path / "out").exists()


def test_a_change_while_it_is_copied(bundle, tmp_path, workshop, monkeypatch):
    from hhdeploy.bundle import hub

    copied, once = hub.copied, []

    def copying(source, target):
        if not once:
            once.append(True)
            add_adapter(bundle, "late", workshop.directory("alpha"))
        return copied(source, target)

    monkeypatch.setattr(hub, "copied", copying)
    with pytest.raises(ConflictError, match="was changed"):
        push(bundle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["hf://nobody", "hf:me/x", "hf://me/x/y", "https://x/y"])
def test_places_that_are_none(bundle, tmp_path, place):
    with pytest.raises(OptionError, match="expected a folder, hf://owner/name"):
        push(bundle, place)
    with pytest.raises(OptionError, match="expected a folder, hf://owner/name"):
        pull(place, tmp_path / "out")


# -- the hub, of which only what it is asked is seen here ----------------------------------------


class Api:
    """Stands in for the hub: it takes what it is given and has an older bundle's files."""

    def __init__(self, calls):
        self.calls = calls

    def create_repo(self, name, exist_ok):
        assert exist_ok
        self.calls.append(("repo", name))

    def list_repo_files(self, name, revision):
        return [ATTRIBUTES, "README.md", "bank.00000000.safetensors"]

    def create_commit(self, name, operations, commit_message, revision):
        self.calls.append(("commit", name, operations, commit_message, revision))
        self.sent = {
            o.path_in_repo: Path(o.path_or_fileobj).read_bytes()
            for o in operations
            if isinstance(getattr(o, "path_or_fileobj", None), str)
        }


def test_what_is_uploaded(bundle, monkeypatch):
    calls = []
    api = Api(calls)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    plan = push(bundle, "hf://me/tasks@main")
    assert calls[0] == ("repo", "me/tasks")
    _, name, operations, message, revision = calls[1]
    assert (name, revision) == ("me/tasks", "main")
    assert message.startswith("Bundle of vit_tiny")
    removed, *added = operations
    assert removed.path_in_repo == "bank.00000000.safetensors"
    given = {o.path_in_repo: o.path_or_fileobj for o in added}
    assert set(given) == {*plan.files, ATTRIBUTES}
    assert given.pop(ATTRIBUTES) == plan.attributes.encode()
    assert api.sent == {name: (bundle / name).read_bytes() for name in given}
    with pytest.raises(OptionError, match="a hub keeps every commit"):
        push(bundle, "hf://me/tasks", overwrite=True)


def test_what_is_uploaded_is_one_version(bundle, monkeypatch, workshop):
    """Of a bundle that is changed while the hub is asked."""
    before = {name: (bundle / name).read_bytes() for name in plan_of(Bundle.open(bundle)).files}
    api = Api([])
    monkeypatch.setattr(
        api,
        "create_repo",
        lambda *args, **kw: add_adapter(bundle, "new", workshop.directory("rival")),
    )
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: api)
    push(bundle, "hf://me/tasks")
    assert api.sent == before
    assert Bundle.open(bundle).manifest.adapter("new") is not None


def test_a_hub_that_refuses(bundle, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: SimpleNamespace(create_repo=refuse))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(WriteError, match=r"hf://me/x: the hub refused, or .*: no route"):
        push(bundle, "hf://me/x")
    with pytest.raises(ReadError, match="hf://me/x: it could not be downloaded: no route"):
        pull("hf://me/x", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_hub_that_is_not_there(bundle, tmp_path, monkeypatch):
    """The hub's own client says so by an error of its transport, of whatever package that is."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and nobody listens
        nowhere = f"http://127.0.0.1:{taken.getsockname()[1]}"
        api = partial(huggingface_hub.HfApi, endpoint=nowhere, token=False)
        load = partial(
            huggingface_hub.snapshot_download, endpoint=nowhere, token=False, cache_dir=tmp_path
        )
        monkeypatch.setattr(huggingface_hub, "HfApi", api)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", load)
        with pytest.raises(WriteError, match=r"hf://me/x: .* or could not be reached: .*refused"):
            push(bundle, "hf://me/x")
        with pytest.raises(ReadError, match="hf://me/x: it could not be downloaded: "):
            pull("hf://me/x", tmp_path / "out")


def test_a_pull_of_the_hub(bundle, tmp_path, monkeypatch):
    push(bundle, tmp_path / "cache")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download",
        lambda name, revision: str(tmp_path / {("me/x", "v1"): "cache"}[name, revision]),
    )  # fmt: skip
    pull("hf://me/x@v1", tmp_path / "out")
    assert contents(tmp_path / "out") == own(bundle)
    (tmp_path / "cache" / "hhdeploy.json").unlink()
    with pytest.raises(BundleError, match=r"^hf://me/x@v1 holds no bundle: hhdeploy\.json was"):
        pull("hf://me/x@v1", tmp_path / "other")


def test_without_the_package(bundle, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"hhdeploy\[hub\]"):
        push(bundle, "hf://me/x")


@pytest.mark.parametrize("nothing", [None, ""])
def test_a_place_that_was_not_given_is_none(bundle, tmp_path, monkeypatch, nothing):
    """``os.environ.get("DEST")`` that is not set was a folder called None."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match="`destination`: expected a folder or hf://"):
        push(bundle, nothing)
    with pytest.raises(OptionError, match="`source`: expected a folder or hf://"):
        pull(nothing, tmp_path / "out")
    assert not list(tmp_path.glob("None"))
