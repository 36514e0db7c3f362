"""The documentation as a site, from the pages as they lie in the checkout.

    python docs/build.py            build/site; ends with 1 at any warning
    python docs/build.py --no-site  only the pages, to build/docs

A link works in the site as it does in the checkout, since the pages are copied with what they link
to, at the same paths. Dead links and anchors are warnings.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "docs"
# Below these, what a page is or shows; and single files that pages link to.
FOLDERS = ("docs", "examples")
KINDS = {".md", ".svg", ".png", ".json", ".yaml", ".html", ".toml"}
FILES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "LICENSE",
    "js/README.md",
    "examples/serving/Containerfile",
)


def copied() -> list[Path]:
    """The files that a site is made of, relative to the checkout."""
    found = [Path(name) for name in FILES]
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            place = path.relative_to(ROOT)
            if path.suffix in KINDS and not {"images", ".data"} & set(place.parts):
                found.append(place)
    return found


def main(arguments: Sequence[str]) -> int:
    """Copy the pages, and make the site of them; gives the exit code."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for place in copied():
        (PAGES / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / place, PAGES / place)
    if "--no-site" in arguments:
        return 0
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    said = done.stdout + done.stderr
    print(said)
    # What reads docstrings only prints what it finds wrong, and strict mode lets that pass.
    return done.returncode or int("griffe:" in said)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
