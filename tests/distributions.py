"""Wheels and sdists of the checkout, built as pip builds them, without asking a package index."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

from tests.workshop import ROOT, run_command

# What the build reads: the package, the folders that it links to, and what pyproject.toml names.
READ = (
    "hhdeploy", "calibration", "exporters", "runtime", "js",
    "pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", ".gitignore",
)  # fmt: skip


def copy_sources(place: Path, *, moment: float, mode: int) -> Path:
    """A checkout's sources at another path, with other times and rights; gives ``place``."""
    place.mkdir(parents=True)
    for name in READ:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", ".*_cache", "node_modules")
            shutil.copytree(ROOT / name, place / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, place / name)
    for path in place.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)
            os.utime(path, (moment, moment))
    return place


def build(sources: Path, out: Path) -> list[Path]:
    """Build ``sources`` into ``out`` with hatchling; gives the wheel and the sdist."""
    done = run_command([sys.executable, "-m", "hatchling", "build", "-d", out], cwd=sources)
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return [wheel, sdist]
