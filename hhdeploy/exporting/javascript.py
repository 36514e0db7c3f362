"""The page's code: TypeScript that travels with this package, compiled, and the runtime it needs.

Compiling takes npm (Node.js), once, where a page is written: what is written needs neither.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from hhdeploy.errors import HhdeployError, MissingDependencyError
from hhdeploy.files.plain import plain_files
from hhdeploy.files.writing import copied, os_errors, temporary_directory

# In a checkout and in a wheel alike.
SOURCES: Final = Path(__file__).parent / "js"
# Of what the sources were developed with, all that a page takes; not Node's runtime, 250 MB.
_TOOLS: Final = ("typescript", "@types/node", "onnxruntime-web")
# WebAssembly alone, and WebGPU in the build that is a third smaller than the other one.
RUNTIME: Final = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.jspi.bundle.min.mjs",
    "ort-wasm-simd-threaded.jspi.wasm",
)
_SCRIPTS: Final = ("app.js", "worker.js")
_STILL: Final = ("index.html", "page.css", "icon.svg")
_PATIENCE_S: Final = 600


def page_code(progress: Callable[[str], None]) -> dict[str, bytes]:
    """All of a page that is the same for every bundle: path in the page's folder -> content.

    ``sw.js`` still lacks its list of files.

    Raises:
        MissingDependencyError: no npm, or no Node.js that it runs on.
        HhdeployError: npm or the compiler ended with an error, e.g. without a network.
    """
    with temporary_directory("page") as folder:
        root = SOURCES
        if not all((SOURCES / "node_modules" / tool).is_dir() for tool in _TOOLS):
            progress("fetching the runtime and the compiler with npm")
            root = _installed(folder / "js")
        progress("compiling the page")
        built = folder / "built"
        compiler = root / "node_modules" / "typescript" / "bin" / "tsc"
        _run("node", str(compiler), "-p", str(root / "web"), "-outDir", str(built))
        runtime = root / "node_modules" / "onnxruntime-web" / "dist"
        scripts = [*(built / "src").glob("*.js"), *(built / "web" / name for name in _SCRIPTS)]
        with os_errors(folder):
            return {
                **{name: (root / "web" / name).read_bytes() for name in _STILL},
                "sw.js": (built / "web" / "sw.js").read_bytes(),
                **{
                    f"js/{file.relative_to(built).as_posix()}": file.read_bytes()
                    for file in scripts
                },
                **{f"ort/{name}": (runtime / name).read_bytes() for name in RUNTIME},
            }


def _installed(root: Path) -> Path:
    """The sources with their tools beside them, in the versions and of the hashes of the lock."""
    for name in plain_files(SOURCES):
        if not name.startswith(("node_modules/", "test/")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            copied(SOURCES / name, root / name)
    lock = json.loads((root / "package-lock.json").read_text(encoding="utf-8"))
    package, lock = narrowed(lock)
    for name, content in (("package.json", package), ("package-lock.json", lock)):
        (root / name).write_text(json.dumps(content), encoding="utf-8")
    # No package runs code of its own.
    settings = "ignore-scripts=true\naudit=false\nfund=false\n"
    (root / ".npmrc").write_text(settings, encoding="utf-8")
    _run("npm", "ci", folder=root)
    return root


def narrowed(lock: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """package.json and package-lock.json of the page's tools alone, of the whole lock."""
    there = lock["packages"]
    wanted = set(_needed(there, _TOOLS))
    tools = {name: there[f"node_modules/{name}"]["version"] for name in _TOOLS}
    package = {"name": "page", "version": "0.0.0", "type": "module", "dependencies": tools}
    packages = {place: there[place] for place in sorted(wanted)}
    return package, {
        "lockfileVersion": lock["lockfileVersion"],
        "packages": {"": package, **packages},
    }


def _needed(there: Mapping[str, Any], names: tuple[str, ...]) -> Iterator[str]:
    """Places in the lock of packages, and of what these need in turn."""
    waiting, seen = list(names), set()
    while waiting:
        name = waiting.pop()
        if name not in seen:
            seen.add(name)
            place = f"node_modules/{name}"
            yield place
            waiting += there[place].get("dependencies", {})


def _run(*command: str, folder: Path | None = None) -> None:
    program = shutil.which(command[0])
    if program is None:
        raise MissingDependencyError(
            f"Writing a page needs the program {command[0]}, which is not on the PATH. Install "
            "Node.js 20 or newer, which brings node and npm: https://nodejs.org"
        )
    try:
        done = subprocess.run(
            [program, *command[1:]],
            cwd=folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=_PATIENCE_S,
        )
    except subprocess.TimeoutExpired as error:
        raise HhdeployError(
            f"{' '.join(command[:2])}: expected its end within {_PATIENCE_S} s. Does npm reach its "
            "registry?"
        ) from error
    if done.returncode:
        for number in (errno.ENOSPC, errno.EDQUOT):
            if errno.errorcode[number] in done.stderr + done.stdout:  # Node's word for it
                raise OSError(number, os.strerror(number))
        said = (done.stderr.strip() or done.stdout.strip())[-2000:]
        raise HhdeployError(
            f"{' '.join(command[:2])} ended with status {done.returncode}:\n{said}\nIt needs "
            "Node.js 20 or newer, and npm its registry."
        )
