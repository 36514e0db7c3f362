"""The house stays one that a newcomer finds the way in: few rooms, small files, no wrong arrows."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path

import pytest

from tests.workshop import ROOT

PACKAGE = ROOT / "hhdeploy"
# Not counted: the command line, training, and the three top-level folders behind links.
OUTSIDE = {"cli", "training", "calibration", "exporters", "runtime"}
ROOMS, FLOORS, FILES, LINES = 20, 7, 15, 400


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


@cache
def tree_of(path: Path) -> ast.Module:
    """A module of the package, parsed once for all that look at it."""
    return ast.parse(path.read_text(encoding="utf-8"))


def trees() -> dict[str, ast.Module]:
    """The package's modules by their place in the checkout."""
    return {path.relative_to(ROOT).as_posix(): tree_of(path) for path in sources()}


def found_by(
    rule: Callable[[ast.Module], Sequence[object]],
    others: Iterable[Path] = (),
    word: str = "",
) -> dict[str, Sequence[object]]:
    """Module -> what a rule finds in it, of the package's and of ``others``; nothing of most.

    ``word``: stands in every module where the rule may find something; only those are parsed.
    """
    found = {path: rule(tree) for path, tree in trees().items()} | {
        path.relative_to(ROOT).as_posix(): rule(ast.parse(text))
        for path in others
        if word in (text := path.read_text(encoding="utf-8"))
    }
    return {path: what for path, what in found.items() if what}


def test_rooms():
    assert len(rooms()) <= ROOMS, sorted(rooms())


def imported_rooms(room: str, tree: ast.AST) -> set[str]:
    """Other rooms that a module of a room imports, at its top or in a function.

    Both count, as for import-linter: an arrow that is hidden in a function is an arrow. What only
    a type checker sees does not.
    """
    typing = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = [
        f"{node.module}.{alias.name}" if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and node not in typing
        for alias in node.names
    ]
    found = {name.split(".")[1] for name in names if name.startswith("hhdeploy.")}
    return found & rooms() - {room}


def longest_chain(arrows: dict[str, set[str]]) -> list[str]:
    """The longest way along the arrows; ValueError if they go round."""
    known: dict[str, list[str]] = {}

    def below(room: str, above: tuple[str, ...] = ()) -> list[str]:
        if room in above:
            raise ValueError(f"rooms import each other: {' -> '.join((*above, room))}")
        if room not in known:
            ways = [below(other, (*above, room)) for other in arrows.get(room, ())]
            known[room] = [room, *max(ways, key=len, default=[])]
        return known[room]

    return max(map(below, arrows), key=len)


def test_floors():
    """From any room down to those that import none, it is few steps."""
    arrows: dict[str, set[str]] = {room: set() for room in rooms()}
    for path in sources():
        place = path.relative_to(ROOT).with_suffix("").parts
        if place[0] == "hhdeploy" and place[1] in arrows:
            arrows[place[1]] |= imported_rooms(place[1], tree_of(path))
    assert len(chain := longest_chain(arrows)) <= FLOORS, " -> ".join(chain)


def test_a_planted_arrow_is_seen():
    lazily = ast.parse("def f():\n    from hhdeploy.verifying.graphs import add_graph")
    assert imported_rooms("building", lazily) == {"verifying"}
    assert imported_rooms("building", ast.parse("import hhdeploy.bundle")) == {"bundle"}
    assert imported_rooms("building", ast.parse("from hhdeploy import plan")) == {"plan"}
    typed = ast.parse("if TYPE_CHECKING:\n    from hhdeploy.plan import Plan")
    assert not imported_rooms("building", typed)
    assert longest_chain({"a": {"b"}, "b": {"c"}, "c": set()}) == ["a", "b", "c"]
    with pytest.raises(ValueError, match="a -> b -> a"):
        longest_chain({"a": {"b"}, "b": {"a"}})


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


# A manifest's own parts are attributes; the keys of graphs, files and versions are data.
TYPED = {"manifest", "_manifest", "backbone", "engines"}


def looked_up_by_string(tree: ast.AST) -> list[int]:
    """Lines where a manifest, its backbone or an engine of it is asked by a string.

    Also through a name: of a value (``facts = manifest.backbone``) or of a member (``for e in
    manifest.engines``).
    """

    def last(node: ast.AST) -> str | None:
        return getattr(node, "attr", getattr(node, "id", None))

    names = set(TYPED)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and last(node.value) in TYPED:
            names |= {name for target in node.targets if (name := last(target))}
        if isinstance(node, (ast.For, ast.comprehension)) and last(node.iter) in TYPED:
            names |= {name} if (name := last(node.target)) else set()
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript):
            owner, key = node.value, node.slice
        elif isinstance(node, ast.Call) and last(node.func) == "get" and node.args:
            owner, key = getattr(node.func, "value", node), node.args[0]
        else:
            continue
        if isinstance(key, ast.Constant) and isinstance(key.value, str) and last(owner) in names:
            lines.append(node.lineno)
    return lines


def test_no_manifest_is_looked_up_by_string():
    others = (p for d in ("benchmarks", "examples") for p in (ROOT / d).rglob("*.py"))
    assert not found_by(looked_up_by_string, others)


@pytest.mark.parametrize(
    "planted",
    [
        'bundle.manifest.backbone["model"]',
        'self._manifest.backbone.get("classes")',
        'facts = bundle.manifest.backbone\nfacts["args"]',
        '[e for e in change.manifest.engines if e["file"] != name]',
        'for entry in manifest.engines:\n    print(entry["file"])',
    ],
)
def test_a_planted_look_up_is_found(planted):
    assert looked_up_by_string(ast.parse(planted))
    assert not looked_up_by_string(ast.parse('manifest.graphs["float32"], manifest.files["a"]'))


def test_every_module_says_what_it_is_for():
    assert not [path for path, tree in trees().items() if not ast.get_docstring(tree)]


def silent_functions(owner: ast.Module | ast.ClassDef) -> list[str]:
    """Public functions, and public methods of public classes, without a docstring."""
    found = []
    for node in owner.body:
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            found += [f"{node.name}.{name}" for name in silent_functions(node)]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            public = not node.name.startswith("_")
            found += [node.name] if public and not ast.get_docstring(node) else []
    return found


def test_every_public_function_says_what_it_does():
    assert not found_by(silent_functions)


def test_a_planted_silent_function_is_found():
    planted = "def f(): 0\nclass C:\n    async def g(self): 0\n    def _h(self): 0\n"
    assert silent_functions(ast.parse(planted)) == ["f", "C.g"]
    assert not silent_functions(ast.parse('def f():\n    """Says."""\nclass _C:\n    def g(): 0'))


def nouns(tree: ast.Module) -> list[str]:
    """Public classes and type aliases of a module: Name is a type, NAME a constant."""
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found.append(node.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            found += [name] if name[0].isupper() and not name.isupper() else []
    return [name for name in found if not name.startswith("_")]


def shared(modules: dict[str, ast.Module]) -> dict[str, list[str]]:
    """Nouns that are in several modules, and where."""
    found: dict[str, list[str]] = defaultdict(list)
    for path, tree in modules.items():
        for name in nouns(tree):
            found[name].append(path)
    return {name: places for name, places in found.items() if len(places) > 1}


def test_a_noun_has_one_meaning():
    modules = trees()
    assert "Bundle" in nouns(modules["hhdeploy/bundle/reading.py"])
    assert shared(modules) == {}


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        ("class Site: 0", "Site = Literal['a']", {"Site"}),
        ("Rows = NDArray", "Rows = NDArray", {"Rows"}),
        ("class _Site: 0", "class _Site: 0", set()),
        ("ROWS = 3", "ROWS = 4", set()),
    ],
)
def test_a_planted_second_meaning_is_found(one, other, clash):
    assert set(shared({"b.py": ast.parse(one), "c.py": ast.parse(other)})) == clash


def test_progress_has_one_type():
    places = [
        path
        for path, tree in trees().items()
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "Progress" for t in node.targets)
    ]
    assert places == ["hhdeploy/bundle/locking.py"]


def cores(tree: ast.Module) -> list[str]:
    """Calls that make an `openvino.Core`."""
    called = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return ["Core" for func in called if getattr(func, "attr", getattr(func, "id", "")) == "Core"]


def test_one_place_makes_openvino_s_core():
    """The only one of a process, see there: a second one, gone, leaves threads without a stack for
    signals."""
    others = (p for d in ("tests", "benchmarks") for p in (ROOT / d).rglob("*.py"))
    assert found_by(cores, others, "Core") == {"runtime/openvino_backend.py": ["Core"]}
    assert cores(ast.parse("ov.Core()")) == cores(ast.parse("Core()")) == ["Core"]


def loads(tree: ast.Module) -> list[str]:
    """Calls of onnx-ir's own `load`."""
    return [
        node.func.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("ir.load", "onnx_ir.load")
    ]


def test_one_place_reads_a_graph_with_its_weights():
    """`open_graph`, which takes files of several names: onnx-ir's refuses them with a traceback."""
    assert found_by(loads) == {"hhdeploy/graph.py": ["load"]}


def endless_programs(tree: ast.Module) -> list[int]:
    """Lines that run a program and wait for it, however long it takes."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and ast.unparse(node.func) == "subprocess.run"
        and "timeout" not in {keyword.arg for keyword in node.keywords}
    ]


def test_every_program_that_a_test_runs_has_its_time():
    """One that hangs is that test's failure. What `tests.release` runs is no test."""
    files = (p for p in (ROOT / "tests").rglob("*.py") if "release" not in p.parts)
    found = found_by(endless_programs, files, "subprocess.run")
    assert not {path: lines for path, lines in found.items() if path.startswith("tests/")}


@pytest.mark.parametrize(("more", "found"), [("", [2]), (", timeout=3", [])])
def test_a_planted_endless_program_is_found(more, found):
    assert endless_programs(ast.parse(f"import subprocess\nsubprocess.run(['x']{more})")) == found
