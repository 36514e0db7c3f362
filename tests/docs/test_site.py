"""The site builds without a warning, and the API's page has all that is public."""

from __future__ import annotations

import re
import shutil
import sys

import pytest

import hhdeploy
from tests.docs.pages import builder
from tests.workshop import ROOT, run_command


def test_every_public_name_is_on_the_api_page():
    """From where `import hhdeploy` takes it."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = dict(re.findall(r"^### hhdeploy\.(\w+)\n\n::: ([\w.]+)$", page, re.M))
    assert shown.keys() == set(hhdeploy.__all__)
    for name, place in shown.items():
        module, attribute = hhdeploy._HOMES[name]
        own = f"{module}.{attribute}" if attribute else module
        assert place in (own, f"{own}.{attribute}"), name


@pytest.fixture
def checkout(tmp_path):
    """A copy of what the site is made of, to build in and to spoil."""
    for place in builder().copied():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / place, tmp_path / place)
    for name in ("zensical.toml", "docs/build.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    for folder in ("hhdeploy", "calibration", "exporters", "runtime"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    return tmp_path


def test_the_site_builds_and_a_planted_fault_does_not(checkout):
    pytest.importorskip("zensical", reason="the site's builder is not installed")
    build = [sys.executable, checkout / "docs" / "build.py"]
    done = run_command(build, cwd=checkout)
    assert done.returncode == 0, done.stdout
    assert "No issues found" in done.stdout
    pages = {p.parent.name for p in (checkout / "build" / "site" / "docs").rglob("index.html")}
    assert {"start", "api", "measured", "jetson"} <= pages
    api = (checkout / "build" / "site" / "docs" / "api" / "index.html").read_text()
    assert "seconds to wait for another process" in api
    for page in checkout.rglob("*.md"):  # what else they hold costs time
        page.write_text("# A page\n")
    with (checkout / "docs" / "idea.md").open("a") as page:
        page.write("\n[there is no such page](nowhere.md)\n")
    done = run_command(build, cwd=checkout)
    assert done.returncode != 0
    assert "page does not exist" in done.stdout
