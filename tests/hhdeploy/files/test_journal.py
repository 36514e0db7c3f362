"""Journals: of what a crash leaves, what they name goes, and nothing else does."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hhdeploy.errors import WriteError
from hhdeploy.files import journal
from hhdeploy.files.journal import JOURNAL, follow_journal, write_journal
from tests.workshop import contents


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "bundle"
    for name in ("adapters/a/x", "adapters/a/deep/y", "adapters/b/x", "adapters/x", "mine"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("x")
    return root


@pytest.fixture
def synced(root, monkeypatch) -> list[tuple[Path, bool]]:
    """Directories in the order in which they were synced, and whether the journal was there."""
    found: list[tuple[Path, bool]] = []
    there = root / JOURNAL
    monkeypatch.setattr(
        journal, "sync_directory", lambda path: found.append((path, there.exists()))
    )
    return found


def test_what_is_named_goes_for_good_and_then_the_journal(root, synced):
    write_journal(root, ["adapters/a/x", "adapters/a/deep/y", "adapters/b/x", "adapters/c/gone"])
    assert synced == [(root, True)], "it is on the disk before anything happens"
    follow_journal(root, "adapters", {"adapters/a/x"})
    assert contents(root).keys() == {"adapters/a/x", "adapters/x", "mine"}
    assert sorted(p.name for p in (root / "adapters").iterdir()) == ["a", "x"]
    assert set(synced[1:]) == {(root / "adapters", True), (root / "adapters" / "a", True)}
    follow_journal(root, "adapters", ())  # there is none
    assert contents(root).keys() == {"adapters/a/x", "adapters/x", "mine"}


@pytest.mark.parametrize("file", ["mine", "adapters/x", "adapters/../mine", "adapters/a/../x"])
def test_what_is_not_in_a_folder_below_stays(root, file):
    before = contents(root)
    (root / JOURNAL).write_text(json.dumps([file]))
    follow_journal(root, "adapters", ())
    assert contents(root) == before


@pytest.mark.parametrize("link", ["adapters", "adapters/a"])
def test_what_a_link_leads_to_is_others(root, tmp_path, link):
    (root / link).rename(tmp_path / "others")
    (root / link).symlink_to(tmp_path / "others")
    before = contents(tmp_path / "others")
    with pytest.raises(WriteError, match=f"bundle/{link} is a symbolic link: what it leads to may"):
        write_journal(root, ["adapters/a/x"])
    (root / JOURNAL).write_text('["adapters/a/x"]')
    follow_journal(root, "adapters", ())
    assert contents(tmp_path / "others") == before
    assert not (root / JOURNAL).exists()


def test_a_bundle_may_be_named_by_a_link(root, tmp_path):
    (tmp_path / "link").symlink_to(root)
    write_journal(tmp_path / "link", ["adapters/a/x"])
    assert json.loads((root / JOURNAL).read_text()) == ["adapters/a/x"]
