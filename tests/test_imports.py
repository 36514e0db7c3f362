"""Who may import whom: the edge needs no torch, and the contracts of import-linter hold."""

from __future__ import annotations

import os
import pkgutil
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest

import hhdeploy
from hhdeploy.errors import require
from tests.workshop import HEAVY, ROOT, run_command, run_python

# What the edge runs: no package of the export extra is there, nor any runtime's.
EDGE = (
    *HEAVY,
    "onnxruntime",
    "nncf",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "peft",
    "click",
    "rich",
    "PIL",
)
CORE = "adapters algebra backbones.facts backbones.sites bundle errors files parity plan".split()
CORE.append("preprocess")


def modules_of(package: str) -> list[str]:
    """A module, or a package and all that is in it."""
    path = ROOT / package.replace(".", "/")
    found = pkgutil.walk_packages([str(path)], f"{package}.") if path.is_dir() else ()
    return [package, *(m.name for m in found)]


IMPORT_ALL = """
    import importlib, sys
    for name in sys.argv[1:]:
        importlib.import_module(name)
"""
# These need the extra `serve` (or `ray`), which brings uvicorn, which brings click.
SERVER = ("hhdeploy.runtime.serving", "hhdeploy.loadtest")


def test_every_module_of_the_runtime_imports_at_the_edge():
    runtime = [m for m in modules_of("hhdeploy.runtime") if not m.startswith(SERVER)]
    core = [m for name in CORE for m in modules_of(f"hhdeploy.{name}")]
    names = [*runtime, *(m for m in core if ".importers" not in m)]
    assert {"hhdeploy.runtime.session", "hhdeploy.runtime.openvino_backend"} <= set(names)
    done = run_python(IMPORT_ALL, *names, blocked=EDGE)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("ray", [True, False])
def test_the_server_imports_without_the_build_machine_and_without_a_runtime(ray):
    names = [m for package in SERVER for m in modules_of(package)]
    assert {"hhdeploy.runtime.serving.http.app", "hhdeploy.runtime.serving.ray.app"} <= set(names)
    # Of the last one jsonschema, which Ray imports, needs nothing: it takes as long as Ray.
    blocked = {*EDGE, "rfc3987_syntax"} - {"click", "rich", "PIL"}
    if not ray:
        names, blocked = [m for m in names if ".ray" not in m], blocked | {"ray"}
    done = run_python(IMPORT_ALL, *names, blocked=blocked)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_importing_hhdeploy_imports_nothing_heavy():
    code = """
        import sys
        import hhdeploy
        assert set(hhdeploy.__all__) <= set(dir(hhdeploy))
        from hhdeploy import load_adapter, export, verify, Reserve
        print(*sorted({name.partition(".")[0] for name in sys.modules}))
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert {"numpy", "hhdeploy"} <= loaded
    assert loaded.isdisjoint({*HEAVY, "onnxruntime"})


def test_every_public_name_is_there():
    assert set(hhdeploy.__all__) == set(hhdeploy._HOMES)
    for name in hhdeploy.__all__:
        found = getattr(hhdeploy, name)
        assert found.__doc__ or get_args(found)  # a Literal has its members alone
        assert found is getattr(hhdeploy, name), "the same the second time"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = hhdeploy.nonsense


# --- what runtimes start when they are imported --------------------------------------------------

# A home of its own; the variable as a user has it who never heard of it.
AT_HOME = """
    import os, sys
    home, sys.argv[:2] = sys.argv[1], ["hhdeploy"]
    for name in ("ORT_DISABLE_TELEMETRY", "XDG_CACHE_HOME", "HHDEPLOY_CACHE"):
        os.environ.pop(name, None)
    os.environ.update(HOME=home, TMPDIR=home)
"""


@pytest.mark.parametrize(
    "line",
    [
        "verify BUNDLE --device cpu",
        "verify BUNDLE --device openvino",
        "adapter pack BUNDLE gamma OUT",
    ],
)
def test_no_command_starts_telemetry(line, branches, tmp_path):
    """With it ONNX Runtime leaves a device id in the home, and a session in TMPDIR, and OpenVINO
    a client id. (`doctor`: tests/cli/test_machine_commands.py.)"""
    pytest.importorskip("openvino" if "openvino" in line else "onnxruntime")
    (home := tmp_path / "home").mkdir()
    words = {"BUNDLE": branches, "OUT": tmp_path / "gamma.onnx_adapter"}
    code = textwrap.dedent(AT_HOME) + "from hhdeploy.cli import main\nmain()\n"
    done = run_python(code, home, *(words.get(word, word) for word in line.split()))
    assert done.returncode == 0, done.stderr
    assert not [path for path in home.rglob("*") if path.is_file()]


def test_importing_prints_and_writes_nothing_and_starts_no_telemetry(tmp_path):
    """Of our modules; the packages may print. NNCF, say, creates its own before it asks the
    variable that turns it off."""
    # Ray, which takes as long as all the others, is imported by the test of the server.
    left = ("__main__", ".serving.ray")
    names = [m for m in modules_of("hhdeploy") if not any(part in m for part in left)]
    assert "hhdeploy.exporters.trace" in names
    code = """
        import importlib.util
        for name in sys.argv[1:]:
            importlib.import_module(name)
        print("imported", flush=True)
        print("imported", file=sys.stderr, flush=True)
        from hhdeploy.errors import require
        for name in ("nncf", "transformers", "peft", "onnxscript", "openvino", "onnxruntime"):
            if importlib.util.find_spec(name) is not None:
                require(name, "calibrate", "a test")
    """
    source = textwrap.dedent(AT_HOME) + textwrap.dedent(code)
    done = run_command([sys.executable, "-c", source, str(tmp_path), *names], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported\n") and done.stderr.startswith("imported\n")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_telemetry_is_the_user_s_to_turn_on(monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    require("json", "cpu", "a test")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY")
    require("json", "cpu", "a test")
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_onnx_runtime_is_imported_in_one_way():
    """By `require`, which turns telemetry off before. `doctor` does so itself."""
    direct = re.compile(r"^\s*(?:import onnxruntime|from onnxruntime)\b", re.MULTILINE)
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in ("hhdeploy", "runtime", "exporters", "calibration")
        for path in (ROOT / folder).rglob("*.py")
        if direct.search(path.read_text(encoding="utf-8"))
    ]
    assert not found


# --- import-linter ------------------------------------------------------------------------------


def checkout(path: Path) -> Path:
    """The packages as one tree below ``path``, links resolved, and the contracts."""
    pytest.importorskip("importlinter")
    ignored = shutil.ignore_patterns("__pycache__", "node_modules")
    shutil.copytree(ROOT / "hhdeploy", path / "hhdeploy", symlinks=False, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", path)
    return path


def lint_imports(path: Path) -> tuple[int, str]:
    """Run import-linter in a tree; its exit code and what it says."""
    code = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    command = [sys.executable, "-c", code, "--no-cache", "--config", str(path / "pyproject.toml")]
    done = run_command(command, cwd=path, path=(path,))
    assert "Contracts" in done.stdout, done.stdout + done.stderr
    return done.returncode, done.stdout


def test_the_contracts_hold(tmp_path):
    code, text = lint_imports(checkout(tmp_path))
    assert (code, " 0 broken" in text) == (0, True), text


# Module, an import that is put there, and words of the contract that it breaks.
PLANTED = [
    ("runtime/session.py", "torch", "the runtime needs no torch"),
    ("runtime/bank.py", "onnx_ir", "the runtime needs no torch"),
    ("runtime/bank.py", "hhdeploy.exporters.trace", "do not know each other"),
    ("exporters/writer.py", "hhdeploy.runtime", "do not know each other"),
    ("plan.py", "hhdeploy.exporters.trace", "the core does not know"),
    ("bundle/manifest.py", "hhdeploy.runtime", "the core does not know"),
    ("files/caches.py", "hhdeploy.calibration.scales", "the core does not know"),
    ("training/attach.py", "hhdeploy.exporting.bundles", "the core does not know"),
    ("runtime/session.py", "hhdeploy.building", "know nothing that composes them"),
    ("calibration/data.py", "hhdeploy.runtime.session", "do not know each other"),
    ("exporters/fold.py", "hhdeploy.cli", "know nothing that composes them"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory) -> dict[str, str]:
    """A tree with all of them: what is said of each broken contract."""
    path = checkout(tmp_path_factory.mktemp("planted"))
    future = "from __future__ import annotations\n"
    for module, planted, _ in PLANTED:
        file = path / "hhdeploy" / module
        text = file.read_text()
        assert future in text
        file.write_text(text.replace(future, f"{future}\nimport {planted}\n", 1))
    code, said = lint_imports(path)
    assert code == 1
    # A name, a line of dashes, the imports; the first piece is what comes before.
    pieces = re.split(r"^(.+)\n-+$", said.partition("Broken contracts")[2], flags=re.MULTILINE)
    return dict(zip(pieces[1::2], pieces[2::2], strict=True))


@pytest.mark.parametrize(("module", "planted", "contract"), PLANTED)
def test_a_planted_import_breaks_a_contract(broken, module, planted, contract):
    """Each is found by itself: the line names the module and what it imports."""
    (said,) = (imports for name, imports in broken.items() if contract in name)
    importer = "hhdeploy." + module.removesuffix(".py").replace("/", ".")
    assert f"{importer} -> {planted} (l." in said, said
