"""The table of extras is pyproject.toml's, and versions compare as numbers."""

from __future__ import annotations

import re

import pytest

try:
    import tomllib
except ImportError:  # Python 3.10, for which pytest brings it under its first name
    import tomli as tomllib

from hhdeploy.errors import MissingDependencyError
from hhdeploy.packages import EXTRAS, INCLUDED, check_version, is_older
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
    del bounds["test"], included["test"]
    assert bounds == EXTRAS
    assert included == INCLUDED


def test_all_of_the_package_is_installed():
    """setuptools takes what it is told: a folder or a picture that is not named is in no wheel."""
    told = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT).as_posix() for path in sources()}
    names = {folder: folder.replace("/", ".") for folder in folders}
    names = {f: n if n.startswith("hhdeploy") else f"hhdeploy.{n}" for f, n in names.items()}
    assert sorted(told["packages"]) == sorted(names.values())
    data = {
        name: sorted(p.name for p in (ROOT / folder).iterdir() if _is_data(p))
        for folder, name in names.items()
    }
    js = ROOT / "hhdeploy" / "exporting" / "js"
    page = [p for folder in (js / "src", js / "web") for p in folder.iterdir()]
    page += [js / name for name in ("package.json", "package-lock.json", "tsconfig.json")]
    data["hhdeploy.exporting"] = sorted(p.relative_to(js.parent).as_posix() for p in page)
    homes = {name: ROOT / folder for folder, name in names.items()}
    brought = {
        name: sorted(
            p.relative_to(homes[name]).as_posix() for f in files for p in homes[name].glob(f)
        )
        for name, files in told["package-data"].items()
    }
    assert brought == {name: files for name, files in data.items() if files}


def _is_data(path):
    return path.is_file() and path.suffix != ".py" and not path.name.startswith(".")


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
