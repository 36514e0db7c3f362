"""The house stays one that a newcomer finds the way in: few rooms, small files, no wrong arrows."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from tests.workshop import ROOT

PACKAGE = ROOT / "hhdeploy"
# Not counted: the command line, training, and the three top-level folders behind links.
OUTSIDE = {"cli", "training", "calibration", "exporters", "runtime"}
ROOMS, FILES, LINES = 20, 15, 400


def rooms() -> set[str]:
    """Children of hhdeploy/ that are modules or packages."""
    return {
        p.stem
        for p in PACKAGE.iterdir()
        if p.stem not in OUTSIDE
        and (p.suffix == ".py" or (p / "__init__.py").is_file())
        and not p.name.startswith("_")
    }


def sources() -> list[Path]:
    """Every module of the package, by its place in the checkout."""
    folders = ("hhdeploy", "exporters", "runtime", "calibration")
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    return sorted(p for p in found if not any(parent.is_symlink() for parent in p.parents))


def test_rooms():
    assert len(rooms()) <= ROOMS, sorted(rooms())


def test_no_package_is_a_heap():
    count: dict[Path, int] = defaultdict(int)
    for path in sources():
        count[path.parent] += 1
    # The command line has a module a command, and the root has the flat rooms.
    heaps = {p: n for p, n in count.items() if n > FILES and p.name not in ("cli", "hhdeploy")}
    assert not heaps


def test_no_module_is_long():
    long = {}
    for path in sources():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        name = path.relative_to(ROOT).as_posix()
        if lines > LINES:
            long[name] = lines
    assert not long


def test_no_module_bears_the_name_of_a_public_function():
    """After its first use ``hhdeploy.export`` would be the module, and the second call fail."""
    import hhdeploy

    functions = {n for n in hhdeploy.__all__ if callable(getattr(hhdeploy, n))}
    assert not rooms() & functions


def test_public_names_stay_what_they_are():
    """With every module imported, each name is used twice."""
    import importlib

    import hhdeploy
    from tests.test_imports import modules_of

    before = {name: getattr(hhdeploy, name) for name in hhdeploy.__all__}
    for module in modules_of("hhdeploy"):
        if not module.startswith(("hhdeploy.cli", "hhdeploy.runtime", "hhdeploy.loadtest")):
            importlib.import_module(module)
    assert {name: getattr(hhdeploy, name) for name in hhdeploy.__all__} == before


def test_every_module_says_what_it_is_for():
    silent = [
        path.relative_to(ROOT).as_posix()
        for path in sources()
        if not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not silent
