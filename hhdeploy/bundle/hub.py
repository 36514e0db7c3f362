"""Bundles in repositories of models: a folder with a hub's layout, or the Hugging Face hub itself.

A repository holds what a bundle holds, under the same names, its card at the top, and
``.gitattributes``, which says what goes to Git LFS, and that ends of lines stay as they are. What
lies beside is no part of the bundle.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from hhdeploy.bundle.locking import BUNDLE, Progress, foreign, undisturbed
from hhdeploy.bundle.manifest import LOCK_TIMEOUT, MANIFEST, SIGNATURE
from hhdeploy.bundle.membership import check_copies
from hhdeploy.bundle.reading import Bundle
from hhdeploy.bundle.signing import check_signature
from hhdeploy.choices import listener, seconds, yes_or_no
from hhdeploy.errors import (
    BundleError,
    ConflictError,
    OptionError,
    ReadError,
    WriteError,
    require,
)
from hhdeploy.files.directories import atomic_directory, check_place
from hhdeploy.files.plain import read_plain
from hhdeploy.files.writing import as_path, copied, temporary_directory, write_bytes

ATTRIBUTES = ".gitattributes"
# Suffixes of what is no text.
_LARGE = (".safetensors", ".onnx", ".data", ".engine", ".bin", ".pt", ".pth", ".npz")
_HUB = re.compile(r"hf://(?P<id>[\w.-]+/[\w.-]+)(@(?P<branch>[\w./-]+))?")
_FILE = "file://"
# What `push` may replace in a folder.
_REPOSITORY = replace(
    BUNDLE, what="a bundle's repository", foreign=partial(foreign, beside={ATTRIBUTES})
)


@dataclass(frozen=True)
class HubLayout:
    """What a push writes.

    Attributes:
        files: relative name -> sha256; None: of what no manifest names.
        attributes: content of ``.gitattributes``.
        large: names of the files that go to Git LFS.
    """

    files: dict[str, str | None]
    attributes: str
    large: tuple[str, ...]


@dataclass(frozen=True)
class _Hub:
    """A repository of the Hugging Face hub, and a branch of it or None."""

    repository: str
    branch: str | None


def plan_of(bundle: Bundle) -> HubLayout:
    """What a push of a bundle writes: all that the manifest names, itself, and a signature."""
    files: dict[str, str | None] = {
        name: bundle.manifest.files[name] for name in sorted(bundle.manifest.files)
    }
    files[MANIFEST] = None
    if (bundle.path / SIGNATURE).is_file():
        files[SIGNATURE] = None
    large = tuple(name for name in files if name.endswith(_LARGE))
    # A clone with other ends of lines, as Git for Windows makes one, has other hashes.
    lines = ["* -text", *(f"*{s} filter=lfs diff=lfs merge=lfs -text" for s in _LARGE)]
    return HubLayout(files, "\n".join(lines) + "\n", large)


def push(
    bundle: str | Path,
    destination: str | Path,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda step: None,
) -> HubLayout:
    """Write a bundle to a repository of models; every hash is compared.

    Args:
        bundle: the bundle's directory.
        destination: a folder (also ``file:///...``), which appears whole, or ``hf://owner/name``
            or ``hf://owner/name@branch``: one commit, which also removes what is beside there.
        overwrite: replace what an earlier push wrote to this folder; a hub keeps older commits.
        dry_run: write nothing.
        progress: called with a few words at each step.

    Returns:
        What was written.

    Raises:
        BundleError: no bundle, or a damaged file. ConflictError: it was changed meanwhile.
        OptionError: ``overwrite`` for a hub, or a destination that is none.
        WriteError: something else is there, the file system or the hub refused.
        MissingDependencyError: huggingface_hub is not installed.
    """
    progress = listener(progress)
    place = _place(destination, "destination")
    overwrite, dry_run = yes_or_no(overwrite, "overwrite"), yes_or_no(dry_run, "dry_run")
    if overwrite and isinstance(place, _Hub):
        raise OptionError("`overwrite=True` is for folders: a hub keeps every commit.")
    opened = Bundle.open(bundle)
    plan = plan_of(opened)
    if dry_run:
        opened.check_files()
    elif isinstance(place, _Hub):
        _upload(opened, plan, place, progress)
    else:
        progress("copying")
        with atomic_directory(place, overwrite=overwrite, kind=_REPOSITORY) as scratch:
            _copy(opened, plan, scratch)
            write_bytes(scratch / ATTRIBUTES, plan.attributes.encode())
    return plan


def pull(
    source: str | Path,
    out: str | Path,
    *,
    public_key: str | Path | None = None,
    overwrite: bool = False,
    lock_timeout: float = LOCK_TIMEOUT,
    progress: Progress = lambda step: None,
) -> Bundle:
    """Get a bundle from a repository of models. Nothing is at ``out`` before all of it is compared
    with its hashes, and with its signature where a key is given.

    Args:
        source: a folder (also ``file:///...``), or ``hf://owner/name``, ``hf://owner/name@branch``.
        out: the bundle's directory.
        public_key: of the key that signed it, in PEM; None: a signature comes along unread.
        overwrite: replace a bundle that is there.
        lock_timeout: seconds to wait, then, for whoever is changing that.
        progress: called with a few words at each step.

    Returns:
        The bundle.

    Raises:
        BundleError: no bundle, a damaged file, or not what was signed.
        ReadError: the hub has no such repository, or is not there. Others as `push`.
    """
    progress = listener(progress)
    place, lock_timeout = _place(source, "source"), seconds(lock_timeout, "lock_timeout")
    overwrite = yes_or_no(overwrite, "overwrite")
    kind = replace(
        BUNDLE, locked=partial(undisturbed, lock_timeout=lock_timeout, progress=progress)
    )
    with atomic_directory(as_path(out, "out"), overwrite=overwrite, kind=kind) as scratch:
        folder = _downloaded(place, progress) if isinstance(place, _Hub) else place
        if isinstance(place, _Hub) and not (folder / MANIFEST).exists():
            raise BundleError(
                f"{source} holds no bundle: {MANIFEST} was expected at its top. `push()` writes it."
            )
        found = Bundle.open(folder)
        progress("copying, and comparing hashes")
        _copy(found, plan_of(found), scratch)
        if public_key is not None:
            progress("comparing with the signature")
            check_signature(scratch, public_key)
    return Bundle.open(out)


def _place(given: object, parameter: str) -> Path | _Hub:
    """Where a repository is. Raises `OptionError` for what is neither a folder nor a hub's."""
    if not isinstance(given, str | os.PathLike) or not str(given):
        raise OptionError(f"`{parameter}`: expected a folder or hf://owner/name, found {given!r}.")
    text = str(given)
    if found := _HUB.fullmatch(text):
        return _Hub(found["id"], found["branch"])
    if text.startswith("hf:") or ("://" in text and not text.startswith(_FILE)):
        raise OptionError(f"{text}: expected a folder, hf://owner/name, or hf://owner/name@branch.")
    return as_path(unquote(text.removeprefix(_FILE)) if text.startswith(_FILE) else text, parameter)


def _copy(bundle: Bundle, plan: HubLayout, target: Path) -> None:
    """Copy what is planned; the manifest is the one that was opened, to the byte, and compared.

    Raises:
        ConflictError: the bundle was changed meanwhile. BundleError: a damaged file.
        WriteError: two names of its files are one there.
    """
    before = read_plain(bundle.path / MANIFEST)
    for name, digest in plan.files.items():
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        check_place(target, name)
        if digest is None:
            copied(bundle.path / name, place)
            continue
        direct = bundle.path / name
        if direct.is_file() and copied(direct, place) == digest:
            continue
        copied(bundle.file(name), place)  # where a change moved it, or it says what is wrong
    check_copies(bundle)
    now = read_plain(bundle.path / MANIFEST)
    if bundle.changed() or not before == now == read_plain(target / MANIFEST):
        raise ConflictError(f"{bundle.path} was changed meanwhile. Run the command again.")


def _upload(bundle: Bundle, plan: HubLayout, place: _Hub, progress: Progress) -> None:
    """One commit that makes the repository what is planned."""
    repository = place.repository
    hub = _library(f"pushing to hf://{repository}")
    with temporary_directory("push") as scratch:
        progress("copying, and comparing hashes")
        _copy(bundle, plan, scratch)  # what is sent is one version, whatever changes meanwhile
        content: dict[str, str | bytes] = {name: str(scratch / name) for name in plan.files}
        content[ATTRIBUTES] = plan.attributes.encode()
        progress(f"uploading to {repository}")
        _commit(hub, bundle, place, content)


def _commit(hub: Any, bundle: Bundle, place: _Hub, content: Mapping[str, str | bytes]) -> None:
    repository, branch = place.repository, place.branch
    try:
        api = hub.HfApi()
        api.create_repo(repository, exist_ok=True)
        there: Iterable[str] = api.list_repo_files(repository, revision=branch)
        operations = [
            *(hub.CommitOperationDelete(name) for name in sorted({*there} - {*content})),
            *(hub.CommitOperationAdd(name, what) for name, what in content.items()),
        ]
        message = f"Bundle of {bundle.manifest.backbone.model}, by hhdeploy"
        api.create_commit(repository, operations, commit_message=message, revision=branch)
    except Exception as error:  # of the transport as well, which changes with the hub's versions
        raise WriteError(
            f"hf://{repository}: the hub refused, or could not be reached: {error}"
        ) from error


def _downloaded(place: _Hub, progress: Progress) -> Path:
    repository, branch = place.repository, place.branch
    hub = _library(f"pulling from hf://{repository}")
    progress(f"downloading {repository}")
    try:
        return Path(hub.snapshot_download(repository, revision=branch))
    except Exception as error:  # as above
        raise ReadError(f"hf://{repository}: it could not be downloaded: {error}") from error


def _library(purpose: str) -> Any:
    return require("huggingface_hub", "hub", purpose)
