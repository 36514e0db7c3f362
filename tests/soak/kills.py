"""Commands that are killed at random moments: export, calibrate, build, adapter add.

After every kill the bundle opens and its hashes hold; after the next command nothing of the
killed ones is left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from hhdeploy.bundle import Bundle
from tests.calibration.conftest import write_pictures
from tests.soak.bundle import WITNESS
from tests.soak.outcome import finish
from tests.support import TINY_ARGS, TINY_MODEL
from tests.workshop import BACKBONE_CLASSES, copy_bundle

HHDEPLOY = Path(sys.executable).with_name("hhdeploy")
Command = Callable[[Path, int], list[str]]


def export(folder: Path, turn: int) -> list[str]:
    """Replace the bundle by one of other adapters."""
    names = ("alpha", "gamma") if turn % 2 else ("gamma",)
    args = json.dumps({**TINY_ARGS, "num_classes": BACKBONE_CLASSES})
    adapters = [x for n in names for x in ("--adapter", str(WITNESS / "branches" / "adapters" / n))]
    return [
        "export", "--model", TINY_MODEL, "--model-args", args, "--checkpoint",
        str(WITNESS / "backbone.safetensors"), *adapters, "--overwrite", "--precision", "float16",
        str(folder / "bundle"),
    ]  # fmt: skip


def calibrate(folder: Path, turn: int) -> list[str]:
    images = str(8 + turn % 3)
    data = str(folder / "pictures")
    bundle = str(folder / "bundle")
    return ["calibrate", bundle, "--data", data, "--images", images, "--threads", "1"]


def build(folder: Path, turn: int) -> list[str]:
    batch = str(1 + turn % 3)
    options = ["--backend", "tensorrt-rtx", "--gpu-arch", "sm89", "--max-batch", batch]
    return ["build", str(folder / "bundle"), *options]


def add(folder: Path, turn: int) -> list[str]:
    return ["adapter", "add", str(folder / "bundle"), f"guest{turn}={WITNESS / 'rival'}"]


COMMANDS: dict[str, Command] = {
    "add": add,
    "export": export,
    "calibrate": calibrate,
    "build": build,
}


def kill_often(name: str, kills: int, until: float, seed: int) -> dict[str, Any]:
    """One command, killed ``kills`` times or, after the first, until the time is over, then run
    once to its end."""
    command, choice, wrong = COMMANDS[name], random.Random(seed), []
    with tempfile.TemporaryDirectory(prefix="hhdeploy-soak-") as place:
        folder = Path(place)
        (folder / "tmp").mkdir()
        copy_bundle(WITNESS / "branches", folder / "bundle")
        for number, adapter in enumerate(("alpha", "gamma")):
            write_pictures(folder / "pictures" / adapter / "a", 12, number)
        begin = time.monotonic()
        wrong += _run(command(folder, 0), folder, None)
        whole = time.monotonic() - begin
        done = 0
        while done < kills and (not done or time.monotonic() < until):
            # The beginning imports packages; the second half is where files are written.
            delay = whole * choice.uniform(0.4, 1.05)
            wrong += _run(command(folder, done + 1), folder, delay)
            wrong += _broken(folder / "bundle")
            done += 1
        wrong += _run(command(folder, kills + 1), folder, None)
        wrong += _broken(folder / "bundle") + _left(folder)
    return {"command": name, "kills": done, "seconds_whole": round(whole, 1), "wrong": wrong}


def _run(arguments: list[str], folder: Path, delay: float | None) -> list[str]:
    environment = {
        **os.environ,
        "TMPDIR": str(folder / "tmp"),
        "HHDEPLOY_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.Popen(
        [str(HHDEPLOY), *arguments],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        _, said = process.communicate(timeout=delay)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return []
    finally:
        process.kill()
    return [] if process.returncode == 0 else [f"{arguments[0]} failed: {said[-400:]}"]


def _broken(bundle: Path) -> list[str]:
    try:
        Bundle.open(bundle).check_files()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
        return [f"after a kill: {type(error).__name__}: {error}"]
    return []


def _left(folder: Path) -> list[str]:
    """Files that no manifest names, beside the bundle, in it, in the cache, and in $TMPDIR."""
    bundle = folder / "bundle"
    named = {*Bundle.open(bundle).manifest.files, "hhdeploy.json"}
    there = {
        p.relative_to(bundle).as_posix()
        for p in bundle.rglob("*")
        if p.is_file() and p.relative_to(bundle).parts[0] != ".old"
    }
    found = [f"in the bundle: {name}" for name in sorted(there - named)]
    found += [f"beside it: {p.name}" for p in folder.iterdir() if p.name.startswith(".")]
    found += [f"in the cache: {p}" for p in (folder / "cache").rglob("*hhdeploy-*")]
    return found + [
        f"temporary: {p.name}" for p in (folder / "tmp").iterdir() if "hhdeploy" in p.name
    ]


@click.command(help=__doc__)
@click.option("--kills", default=20, show_default=True, help="Of each command.")
@click.option("--seconds", default=3600.0, show_default=True, help="For each command, at most.")
@click.option("--only", multiple=True, type=click.Choice(list(COMMANDS)))
@click.option("--seed", default=0, show_default=True)
def main(kills: int, seconds: float, only: tuple[str, ...], seed: int) -> None:
    if not HHDEPLOY.exists():
        raise click.ClickException(f"{HHDEPLOY} is not there: pip install -e .")
    results = [
        kill_often(name, kills, time.monotonic() + seconds, seed) for name in only or COMMANDS
    ]
    wrong = [f"{one['command']}: {text}" for one in results for text in one.pop("wrong")]
    finish({"commands": results, "wrong": wrong})


if __name__ == "__main__":
    sys.exit(main())
