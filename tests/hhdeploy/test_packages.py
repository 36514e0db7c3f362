"""The table of extras is pyproject.toml's, and versions compare as numbers."""

from __future__ import annotations

import re
import tarfile
import zipfile
from pathlib import Path

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10, for which pytest brings it under its first name
    import tomli as tomllib

from hhdeploy.errors import MissingDependencyError
from hhdeploy.packages import EXTRAS, INCLUDED, check_version, is_older
from tests.distributions import build, copy_sources
from tests.release.__main__ import PYTHONS
from tests.release.__main__ import requirements as asked_for
from tests.test_house import sources
from tests.workshop import ROOT

# name[extras]>=version,<version
_REQUIREMENT = re.compile(r"([\w-]+)(?:\[(.+)\])?(?:>=([\d.]+))?(?:,<[\d.]+)?$")


def test_the_table_is_the_one_of_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds: dict[str, dict[str, str]] = {}
    included: dict[str, tuple[str, ...]] = {}
    for extra, requirements in project["optional-dependencies"].items():
        for requirement in requirements:
            match = _REQUIREMENT.match(requirement.partition(";")[0])
            assert match is not None, requirement
            name, inner, bound = match.groups()
            if name == "hhdeploy":
                included[extra] = tuple(inner.split(","))
            else:
                bounds.setdefault(extra, {})[name] = bound
    for tools in ("docs", "peers", "test"):  # of contributors, which no code asks for
        bounds.pop(tools), included.pop(tools, None)
    assert bounds == EXTRAS
    assert included == INCLUDED


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> list[Path]:
    """The wheel and the sdist of this checkout."""
    place = tmp_path_factory.mktemp("built")
    return build(copy_sources(place / "here", moment=1_000_000_000, mode=0o644), place / "dist")


def content(archive: Path) -> dict[str, bytes]:
    """What is below hhdeploy/ in a wheel, or in the folder of an sdist."""
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            files = {name: wheel.read(name) for name in wheel.namelist()}
    else:
        with tarfile.open(archive) as sdist:
            members = [m for m in sdist.getmembers() if m.isfile()]
            files = {m.name.partition("/")[2]: sdist.extractfile(m).read() for m in members}
    return {name: text for name, text in files.items() if name.startswith("hhdeploy/")}


def test_all_of_the_package_is_in_wheel_and_sdist(built):
    """Also what lies behind the links, and what is no module."""
    folders = {path.parent for path in sources()}
    folders |= {ROOT / "hhdeploy/exporting/js" / name for name in ("", "src", "web")}
    ours = {}
    for path in (p for folder in folders for p in folder.iterdir()):
        if path.is_file() and path.suffix != ".pyc" and not path.name.startswith("."):
            name = path.relative_to(ROOT).as_posix()
            ours[name if name.startswith("hhdeploy/") else f"hhdeploy/{name}"] = path.read_bytes()
    assert "hhdeploy/py.typed" in ours and "hhdeploy/runtime/serving/http/page.html" in ours
    wheel, sdist = built
    assert content(wheel) == ours
    assert content(sdist) == ours


def test_they_are_the_same_to_the_byte(built, tmp_path):
    """From another folder, at another time, of files with other times and rights."""
    sources = copy_sources(tmp_path / "else" / "where", moment=1_700_000_000, mode=0o664)
    again = build(sources, tmp_path / "dist")
    assert [path.name for path in again] == [path.name for path in built]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in built]


def test_the_wheel_asks_for_what_each_python_has_wheels_of(built):
    """The oldest versions are installed by ``make release-check``, which reads them so."""
    wheel, _ = built
    found = {python: asked_for(wheel, ("cpu",), python) for python in PYTHONS}
    numpy = {python: [r for r in asked if r.startswith("numpy")] for python, asked in found.items()}
    assert numpy == {p: ["numpy>=2.1" if p == "3.13" else "numpy>=1.26"] for p in PYTHONS}
    for asked in found.values():
        assert "onnxruntime>=1.22" in asked and not any(";" in requirement for requirement in asked)
        assert not any(requirement.startswith(("torch", "aiohttp")) for requirement in asked)


def test_a_release_is_tried_on_every_python_that_it_names():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [line.rpartition(" ")[2] for line in project["classifiers"] if ":: 3." in line]
    assert tuple(named) == PYTHONS
    assert project["requires-python"] == f">={PYTHONS[0]}"


@pytest.mark.parametrize(
    ("found", "bound", "older"),
    [
        ("2024.6.0-17404-4c0f47d2335-releases/2024/6", "2025.0", True),
        ("2025.0.0-17942-1f68be9f594-releases/2025/0", "2025.0", False),
        ("2025.0", "2025.0.0", False),
        ("2026.4.1", "2025.0", False),
        ("1.9.9", "1.10", True),
        ("1.10", "1.9", False),
        ("2.0.0rc1", "2.0", False),
        ("10.2.9", "10.3", True),
        ("unknown", "1.0", True),
    ],
)
def test_versions_compare_as_numbers(found, bound, older):
    assert is_older(found, bound) is older


def test_what_is_too_old_names_the_upgrade():
    with pytest.raises(
        MissingDependencyError, match=r"nncf: expected version 3.4 .* found 3.3.9"
    ) as e:
        check_version("calibrate", "nncf", "3.3.9")
    assert "pip install -U 'hhdeploy[calibrate]'" in str(e.value)
    check_version("calibrate", "nncf", "3.4.0")
