"""Anonymous memory of the export of a large model, folded and as side branches, verified. Linux.

    python -m benchmarks.bench_large [--model vit_giant_patch14_224] [--images 2] [--size 56]
        [--saved] [--kind fold|branches|both]

The peak of RssAnon of a process of its own, step by step: what the kernel cannot drop, unlike
pages of mapped files. Random weights by timm's own initialisation, in memory; with ``--saved``
from a safetensors file of them. ``--size`` is that of the images: a small one saves time, the
weights stay what they are.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

from benchmarks.harness import report
from benchmarks.models import adapter_directories, work_directory
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import BackboneSpec
from hhdeploy.exporting.bundles import export

_SECONDS = 0.01


class Watch:
    """The peak of the process's RssAnon in every step; a step begins when it is named."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}
        self._step = "starting"
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ends.set()
        self._thread.join()

    def step(self, name: str) -> None:
        """From now on the figures are of this step."""
        self._step = name

    def _sample(self) -> None:
        while not self._ends.wait(_SECONDS):
            step = self._step
            self.peaks[step] = max(self.peaks.get(step, 0), anonymous_mb())


def anonymous_mb() -> int:
    """RssAnon of this process in megabytes of 2**20 bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) // 1024
    raise OSError("/proc/self/status has no RssAnon; expected a Linux of this century.")


@click.command()
@click.option("--model", default="vit_giant_patch14_224", show_default=True)
@click.option("--images", default=2, show_default=True)
@click.option("--size", default=None, type=int, help="Side of the images; the model's own.")
@click.option("--saved", is_flag=True, help="Weights from a safetensors file.")
@click.option("--kind", type=click.Choice(["fold", "branches", "both"]), default="both")
def main(model: str, images: int, size: int | None, saved: bool, kind: str) -> None:
    """Export a model with an adapter folded, then with two as side branches."""
    args = {} if size is None else {"img_size": size}
    directories = _alone(adapter_directories, model, 2, args)
    adapters = {name: str(path) for name, path in directories.items()}
    checkpoint = _alone(_saved, model, args) if saved else None
    results: dict[str, Any] = {"model": model, "size": size, "images": images, "saved": saved}
    for name in ("fold", "branches") if kind == "both" else (kind,):
        results[name] = _alone(_export, model, adapters, name, images, checkpoint)
        print(name, results[name], flush=True)
    report("large", results)


def _alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function, run in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _saved(model: str, args: dict[str, Any]) -> str:
    """The random weights as a safetensors file."""
    from safetensors.torch import save_file

    path = work_directory() / f"{model}.safetensors"
    if not path.is_file():
        backbone = load_backbone(BackboneSpec(model, args, pretrained=False))
        save_file(backbone.model.state_dict(), path)
    return str(path)


def _export(
    model: str, adapters: dict[str, str], kind: str, images: int, checkpoint: str | None
) -> dict[str, Any]:
    """One export, verified: weights, peaks in MB, and the worst error over the range."""
    out, cache = work_directory() / "large", work_directory() / "large-cache"
    for path in (out, cache):
        shutil.rmtree(path, ignore_errors=True)
    fold = kind == "fold"
    started = time.perf_counter()
    with Watch() as watch:
        result = export(
            model,
            dict(list(adapters.items())[:1]) if fold else adapters,
            out,
            fold=fold,
            pretrained=False,
            checkpoint=checkpoint,
            verify_images=images,
            cache=cache,
            progress=watch.step,
        )
    assert result.parity is not None
    weights = (out / "model.onnx.data").stat().st_size / 2**20
    peak = max(watch.peaks.values())
    for path in (out, cache):
        shutil.rmtree(path)
    return {
        "seconds": round(time.perf_counter() - started),
        "weights_mb": round(weights),
        "peak_mb": peak,
        "peak_of_weights": round(peak / weights, 2),
        "passed": result.parity.passed,
        "worst_range_error": max(s.comparison.range_error for s in result.parity.stages),
        "peaks_mb": watch.peaks,
    }


if __name__ == "__main__":
    main()
