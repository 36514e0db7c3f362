"""Which files of the project data walks through: ``python -m benchmarks.walk WAY [--against DIR]``.

A way is a command, run with a profiler in a process of its own; a file counts when one of its
functions ran. With ``--against`` the same command runs in another checkout too.

\b
  row       adapter add: from an adapter directory to a row of the bank
  logits    export and predict: from a model and adapters to answers
  response  serve: from a request to its response, the start left out
  graph     calibrate: from images to a Q/DQ graph
  engine    build: from a bundle to an engine
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import click

from tests.calibration.conftest import write_pictures
from tests.support import TINY_ARGS, TINY_MODEL
from tests.workshop import BACKBONE_CLASSES

ROOT = Path(__file__).resolve().parents[1]
WITNESS = ROOT / "tests" / "witnesses" / "v1"

# Runs a command of whatever checkout is on the path, and writes the files whose functions ran.
_PROFILED = """
import json, os, signal, sys, threading
root, out, on = os.path.realpath(sys.argv[1]), sys.argv[2], [sys.argv[3] == "now"]
seen = set()

def called(frame, event, argument):
    code = frame.f_code
    if on[0] and event == "call" and code.co_flags & 1:  # a function, no module or class body
        seen.add(code.co_filename)

signal.signal(signal.SIGUSR1, lambda *_: on.__setitem__(0, not on[0]))
threading.setprofile(called)
sys.setprofile(called)
from hhdeploy.cli import main
sys.argv = ["hhdeploy", *sys.argv[4:]]
try:
    main()
finally:
    on[0] = False
    files = {os.path.relpath(os.path.realpath(f), root) for f in seen}
    own = ("hhdeploy/", "exporters/", "runtime/", "calibration/")
    with open(out, "a") as stream:
        stream.writelines(f + "\\n" for f in files if f.startswith(own))
"""


class Walk:
    """Commands of one checkout, below a scratch directory."""

    def __init__(self, checkout: Path, folder: Path) -> None:
        self.checkout, self.folder = checkout, folder
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(checkout),
            "HHDEPLOY_CACHE": str(folder / "cache"),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "ignore",
        }

    def bundle(self, name: str = "branches") -> Path:
        """A bundle of the scratch directory's own."""
        return Path(shutil.copytree(WITNESS / name, self.folder / "bundle"))

    def start(self, *arguments: object, when: str = "now") -> subprocess.Popen[str]:
        command = [sys.executable, "-c", _PROFILED, self.checkout, self.folder / "seen", when]
        return subprocess.Popen(
            [str(a) for a in (*command, *arguments)],
            env=self.environment,
            cwd=self.checkout,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *arguments: object) -> None:
        process = self.start(*arguments)
        process.communicate()
        if process.returncode:
            raise click.ClickException(f"{arguments[0]} failed in {self.checkout}")

    def files(self) -> list[str]:
        """What was seen."""
        return sorted(set((self.folder / "seen").read_text().split()))


def row(walk: Walk) -> None:
    walk.run("adapter", "add", walk.bundle(), f"guest={WITNESS / 'rival'}")


def logits(walk: Walk) -> None:
    args = json.dumps({**TINY_ARGS, "num_classes": BACKBONE_CLASSES})
    adapter, out = WITNESS / "branches" / "adapters" / "alpha", walk.folder / "out"
    walk.run(
        "export", "--model", TINY_MODEL, "--model-args", args, "--checkpoint",
        WITNESS / "backbone.safetensors", "--adapter", adapter, out,
    )  # fmt: skip
    write_pictures(walk.folder / "pictures", 1, 0)
    walk.run("predict", out, walk.folder / "pictures" / "0.png", "--device", "cpu")


def response(walk: Walk) -> None:
    options = ("--device", "cpu", "--http-port", "0", "--grpc-port", "-1", "--model-name", "m")
    process = walk.start("serve", walk.bundle(), *options, when="later")
    try:
        assert process.stdout is not None
        url = next(w for line in process.stdout for w in line.split() if w.startswith("http://"))
        url = url.rstrip(",/")
        image = {"name": "images", "datatype": "FP32", "shape": [1, 3, 32, 32]}
        body = {"inputs": [{**image, "data": [0.5] * 3072}], "parameters": {"adapter": "alpha"}}
        for turn in range(3):
            if turn == 2:  # what only the first requests do is left out
                process.send_signal(signal.SIGUSR1)
                time.sleep(0.5)
            request = urllib.request.Request(
                f"{url}/v2/models/m/infer",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                answer.read()
        process.send_signal(signal.SIGUSR1)
        time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def graph(walk: Walk) -> None:
    for number, adapter in enumerate(("alpha", "gamma")):
        write_pictures(walk.folder / "pictures" / adapter / "a", 12, number)
    walk.run("calibrate", walk.bundle(), "--data", walk.folder / "pictures", "--images", "16")


def engine(walk: Walk) -> None:
    walk.run("build", walk.bundle(), "--backend", "tensorrt-rtx")


WAYS: dict[str, Callable[[Walk], None]] = {
    "row": row,
    "logits": logits,
    "response": response,
    "graph": graph,
    "engine": engine,
}


def walked(way: str, checkout: Path) -> list[str]:
    """The files of one checkout."""
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(checkout, Path(folder))
        WAYS[way](walk)
        return walk.files()


@click.command(help=__doc__)
@click.argument("way", type=click.Choice([*WAYS, "all"]))
@click.option("--against", type=click.Path(path_type=Path, file_okay=False, exists=True))
def main(way: str, against: Path | None) -> None:
    results = {}
    for name in WAYS if way == "all" else (way,):
        ours = walked(name, ROOT)
        results[name] = {"files": len(ours)}
        print(f"{name}: {len(ours)} files")
        for file in ours:
            print(f"  {file}")
        if against is not None:
            theirs = walked(name, against.resolve())
            results[name]["against"] = len(theirs)
            print(f"  in {against}: {len(theirs)} files")
    print(json.dumps({"benchmark": "walk", "results": results}))


if __name__ == "__main__":
    main()
