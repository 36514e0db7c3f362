"""Who may import whom: the edge needs no torch, and the contracts of import-linter hold."""

from __future__ import annotations

import pkgutil
import re
import shutil
import sys
import textwrap
from pathlib import Path
from typing import get_args

import pytest

import hhdeploy
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
    blocked = set(EDGE) - {"click", "rich", "PIL"}
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


def test_importing_prints_and_writes_nothing(tmp_path):
    # Ray, which takes as long as all the others, is imported by the test of the server.
    left = ("__main__", ".serving.ray")
    names = [m for m in modules_of("hhdeploy") if not any(part in m for part in left)]
    assert "hhdeploy.exporters.trace" in names
    code = """
        import importlib, sys
        for name in sys.argv[1:]:
            importlib.import_module(name)
    """
    done = run_command([sys.executable, "-c", textwrap.dedent(code), *names], cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# --- import-linter ------------------------------------------------------------------------------


def checkout(path: Path) -> Path:
    """The packages as one tree below ``path``, links resolved, and the contracts."""
    pytest.importorskip("importlinter")
    ignored = shutil.ignore_patterns("__pycache__")
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
