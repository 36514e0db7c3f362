"""``make release-check``: what would be released is what was tested.

    python -m tests.release                        the Pythons that are here, 3.10 to 3.13
    python -m tests.release --python 3.12 --python 3.13
    python -m tests.release --edge                 without torch: minutes less, gigabytes less

Builds wheel and sdist in two folders and at two times, and compares them to the byte. Installs the
wheel into empty environments and runs `tests/release/smoke.py` there, away from the checkout: a
build machine (extras export and cpu) on this Python, an edge (cpu and serve) on each; with the
newest versions of what they need, and with the oldest that pyproject.toml allows. mypy reads the
types of one that is installed. Writes the wheel, the sdist and a bill of materials to dist/. Needs
a package index; `UV_CONSTRAINT=FILE` and the like reach uv.
"""

from __future__ import annotations

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement

from tests.distributions import build, copy_sources
from tests.workshop import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SMOKE = Path(__file__).with_name("smoke.py")
EXTRAS = {"build": ("export", "cpu"), "edge": ("cpu", "serve")}
# The second assignment is wrong, which only a reader of hhdeploy's types can tell.
TYPED = """import hhdeploy
right: hhdeploy.Adapter = hhdeploy.load_adapter("a")
wrong: int = hhdeploy.load_adapter("a")
"""
RESOLUTIONS = ("highest", "lowest-direct")
DIST = ROOT / "dist"


def run(command: Sequence[object], **options: object) -> str:
    """A program that must succeed; gives its output."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def built_twice(place: Path) -> list[Path]:
    """Wheel and sdist in dist/, the same to the byte from two copies of the sources."""
    found = []
    for name, moment, mode in (("one", 1e9, 0o644), ("an/other", 1.7e9, 0o664)):
        sources = copy_sources(place / name / "src", moment=moment, mode=mode)
        found.append(build(sources, place / name / "dist"))
        time.sleep(1.1)  # a clock in a file shows
    for one, other in zip(*found, strict=True):
        if one.read_bytes() != other.read_bytes():
            raise SystemExit(f"{one.name}: two builds of the same sources differ.")
    DIST.mkdir(exist_ok=True)
    return [Path(shutil.copy(path, DIST)) for path in found[0]]


def requirements(wheel: Path, extras: Sequence[str], python: str) -> list[str]:
    """What a wheel asks for with some extras on a Python ("3.13"), as its metadata says it."""
    with zipfile.ZipFile(wheel) as opened:
        (name,) = (n for n in opened.namelist() if n.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(opened.read(name)).get_all("Requires-Dist") or []
    found = []
    places = [{"extra": extra, "python_version": python} for extra in extras]
    for text in told:
        requirement = Requirement(text)
        marker, requirement.marker = requirement.marker, None
        if marker is None or any(map(marker.evaluate, places)):
            found.append(str(requirement))
    return found


@dataclass(frozen=True)
class Environments:
    """Makes empty environments with a wheel in them.

    Attributes:
        place: a scratch directory.
        tools: a Python environment with uv, cyclonedx-bom and mypy.
        wheel: what is installed.
    """

    place: Path
    tools: Path
    wheel: Path

    def make(self, part: str, python: str, resolution: str) -> Path:
        """An environment of some Python with the wheel and what ``part`` needs; gives it."""
        out = self.place / f"{part}-{python}-{resolution}"
        uv = self.tools / "bin" / "uv"
        run([uv, "venv", "-q", "--no-python-downloads", "--python", python, out])
        asked = out / "requirements.txt"
        needed = requirements(self.wheel, EXTRAS[part], python)
        asked.write_text("\n".join([*needed, str(self.wheel)]))
        install = [uv, "pip", "install", "-q", "--resolution", resolution]
        run([*install, "--python", out / "bin" / "python", "-r", asked])
        return out

    def bill(self, environment: Path) -> Path:
        """A CycloneDX bill of materials of an environment, without times and serial numbers."""
        out = DIST / f"{self.wheel.name.rpartition('-py3')[0]}.cdx.json"
        tool = [self.tools / "bin" / "cyclonedx-py", "environment", "--output-reproducible"]
        run([*tool, "--pyproject", ROOT / "pyproject.toml", "-o", out, environment / "bin/python"])
        return out

    def typed(self, environment: Path) -> None:
        """mypy, elsewhere, reads the types of an installed hhdeploy, and finds a wrong one."""
        program = self.place / "typed.py"
        program.write_text(TYPED)
        tool = [self.tools / "bin" / "mypy", "--strict", "--no-incremental"]
        command = [*tool, "--python-executable", environment / "bin" / "python", program]
        words = [str(word) for word in command]
        # Away from the checkout, whose modules and settings mypy would take.
        done = subprocess.run(words, cwd=self.place, capture_output=True, text=True, check=False)
        found = re.findall(r"typed\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
        if found != [("3", "assignment")]:
            raise SystemExit(f"mypy does not see hhdeploy's types:\n{done.stdout}{done.stderr}")


def smoke(environment: Path, part: str, place: Path) -> None:
    """Run one part of the smoke test in an environment, with nothing of this one's."""
    home = place / "home"
    home.mkdir(exist_ok=True)
    own = {"HOME": str(home), "PATH": os.defpath, "OMP_NUM_THREADS": "1"}
    run([environment / "bin" / "python", "-I", SMOKE, part, place], cwd=home, env=own)


def pythons(chosen: Sequence[str], uv: Path) -> Iterator[str]:
    """The versions that are asked for and are here."""
    for version in chosen:
        find = [uv, "python", "find", "-q", "--no-python-downloads", version]
        done = subprocess.run(list(map(str, find)), capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"Python {version}: not here. {' '.join(done.stderr.split())[:160]}")
        else:
            yield version


def main(arguments: Sequence[str]) -> None:
    """Check everything; ends with the first thing that is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.release")
    parser.add_argument("--python", action="append", help="repeatable; default: 3.10 to 3.13")
    parser.add_argument("--edge", action="store_true", help="no build machine, and no torch")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="hhdeploy-release-") as folder:
        place = Path(folder)
        wheel, sdist = built_twice(place)
        print(f"{wheel.name}, {sdist.name}: the same to the byte, twice")
        tools = place / "tools"
        run([sys.executable, "-m", "venv", tools])
        run([tools / "bin" / "pip", "install", "-q", "uv", "cyclonedx-bom", "mypy"])
        environments = Environments(place, tools, wheel)
        _try_all(environments, asked.python or PYTHONS, asked.edge)


def _try_all(environments: Environments, chosen: Sequence[str], edge_only: bool) -> None:
    """Build machines make the bundles that edges open: the oldest packages' by the newest too."""
    place = environments.place
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    bundles = place / "made"
    for resolution in () if edge_only else RESOLUTIONS:
        environment = environments.make("build", own, resolution)
        shutil.rmtree(bundles, ignore_errors=True)
        bundles.mkdir()
        smoke(environment, "build", bundles)
        print(f"build machine, Python {own}, {resolution}: train, export, verify, predict")
        if resolution == "highest":
            print(f"bill of materials: {environments.bill(environment).name}")
        shutil.rmtree(environment)
    if edge_only:
        bundles.mkdir()
        _made_here(bundles)
    for python in pythons(chosen, environments.tools / "bin" / "uv"):
        for resolution in RESOLUTIONS:
            environment = environments.make("edge", python, resolution)
            own_copy = shutil.copytree(bundles, place / f"{python}-{resolution}")
            smoke(environment, "edge", own_copy)
            print(f"edge, Python {python}, {resolution}: verify, predict, add, serve")
            if (python, resolution) == (own, "highest"):
                environments.typed(environment)
                print(f"types, Python {python}: mypy reads them from the installed wheel")
            shutil.rmtree(environment)


def _made_here(place: Path) -> None:
    """The bundles by this environment's own packages, from the checkout."""
    code = "import pathlib, sys, tests.release.smoke as s; s.build(pathlib.Path(sys.argv[1]))"
    run([sys.executable, "-c", code, place], cwd=ROOT)


if __name__ == "__main__":
    main(sys.argv[1:])
