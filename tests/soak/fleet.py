"""A server that watches a directory whose adapters are replaced by `adapter import --overwrite`.

Every request must be answered, by the old or the new adapter of its name.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from hhdeploy.parity import bound, compare
from tests.runtime.serving.servers import running_server
from tests.soak.bundle import SOURCES, WITNESS, known_logits
from tests.soak.outcome import finish

NAMES = ("one", "two", "three")
# Seconds, on a busy machine.
_FOLLOWS_WITHIN = 120.0


def replace(folder: Path, until: float, told: Any) -> None:
    """`adapter import --overwrite` of one and the other, name after name."""
    import torch

    from hhdeploy.adapters.format import load_adapter
    from hhdeploy.cli.adapter_import import command

    torch.set_num_threads(1)
    done, wrong = 0, []
    for source, directory in SOURCES.items():
        adapter = load_adapter(directory)
        assert adapter.head is not None
        tensors = {f"{adapter.head.path}.weight": adapter.head.weight}
        tensors[f"{adapter.head.path}.bias"] = adapter.head.bias
        for site, found in adapter.sites.items():
            for key in ("u", "v", "d", "lora_A", "lora_B"):
                value = getattr(found, key)
                if value is not None:
                    tensors[f"{site}.{key}"] = value
        torch.save({k: torch.from_numpy(v) for k, v in tensors.items()}, folder / f"{source}.pth")
    args = load_adapter(SOURCES["rival"]).config.base_model_args
    import json

    options = [
        "--model", "vit_tiny_patch16_224", "--model-args", json.dumps(dict(args)),
        "--checkpoint", str(WITNESS / "backbone.safetensors"), "--overwrite",
    ]  # fmt: skip
    try:
        # The other adapter comes last: whoever asks sees both, however fast the imports are.
        while time.monotonic() < until or not done or done % (2 * len(NAMES)):
            source = list(SOURCES)[done // len(NAMES) % 2]
            out = folder / "fleet" / NAMES[done % len(NAMES)]
            command.main([str(folder / f"{source}.pth"), str(out), *options], standalone_mode=False)
            done += 1
            told.put((done, (out.name, source), []))
    except Exception as error:  # noqa: BLE001 - whatever it is, it is what this looks for
        wrong.append(f"import: {type(error).__name__}: {error}")
    told.put((done, None, wrong))
    told.put(None)


def soak(folder: Path, seconds: float) -> dict[str, Any]:
    """A server, who replaces, and who asks."""
    from hhdeploy.files.writing import copy_directory

    images, known = known_logits()
    images = images[:1]
    for name in NAMES:
        copy_directory(SOURCES["rival"], folder / "fleet" / name)
    context = multiprocessing.get_context("spawn")
    told = context.Queue()
    options = ("--adapters-dir", folder / "fleet", "--watch-seconds", "0.1", "--model-name", "soak")
    asked, imports = 0, 0
    # What every name is by now, and the names that have not answered so since the last import.
    current = dict.fromkeys(NAMES, "rival")
    behind, give_up = set(NAMES), math.inf
    answers: dict[str, int] = dict.fromkeys(SOURCES, 0)
    wrong: list[str] = []
    with running_server(WITNESS / "branches", folder / "log", *options) as server:

        def ask(name: str) -> None:
            nonlocal asked
            status, found = server.logits("soak", name, images)
            asked += 1
            if status != 200:
                wrong.append(f"{name}: HTTP {status}: {found}")
                return
            is_of = [s for s in SOURCES if _is(known[s][:1, : found.shape[1]], found)]
            if is_of:
                answers[is_of[0]] += 1
                if is_of[0] == current[name]:
                    behind.discard(name)
            else:
                wrong.append(f"{name} answered as neither the old nor the new adapter")

        for name in NAMES:  # before anything is replaced
            ask(name)
        job = context.Process(
            target=replace, args=(folder, time.monotonic() + seconds, told), daemon=True
        )
        job.start()
        # The first time it imports torch, which takes longer than all that follows.
        while job.is_alive() and told.empty():
            time.sleep(0.1)
        while (give_up == math.inf or behind) and time.monotonic() < give_up:
            ended = not job.is_alive()
            if ended and give_up == math.inf and told.empty():
                wrong.append(f"who replaces them ended by {job.exitcode}, without a word")
                break
            ask(NAMES[asked % len(NAMES)])
            while not told.empty():
                event = told.get()
                if event is None:
                    behind, give_up = set(NAMES), time.monotonic() + _FOLLOWS_WITHIN
                    continue
                imports, replaced, failed = event
                current |= [replaced] if replaced else []
                wrong += failed
        job.join(60)
    wrong += [f"{name} still answers as it was before the last import" for name in sorted(behind)]
    left = sorted(p.name for p in (folder / "fleet").iterdir() if p.name not in NAMES)
    return {
        "seconds": seconds,
        "requests": asked,
        "imports": imports,
        "answers": answers,
        "wrong": [*wrong, *(f"{name} is left" for name in left)],
    }


def _is(known: Any, found: Any) -> bool:
    return not compare(known, found).failures(bound("branches", "float32"))


@click.command(help=__doc__)
@click.option("--seconds", default=120.0, show_default=True)
def main(seconds: float) -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="hhdeploy-soak-") as folder:
        finish(soak(Path(folder), seconds))


if __name__ == "__main__":
    sys.exit(main())
