"""Make the starter models from nothing: ``python examples/starter/make.py``.

Fetches the data, pre-trains the backbone, trains the four adapters with ``hhdeploy train``,
evaluates, and writes the test images. A stage whose result exists is skipped, an interrupted one
goes on where it stopped; ``--redo STAGE`` repeats it. Pre-training takes about half an hour on one
CPU thread, the rest about 20 minutes.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import backbone
import torch
from evaluate import evaluate
from fetch_data import CACHE, FetchError, load_task
from parts import TASKS, write_folders
from recipes import RECIPES, SEED, WEIGHT_DECAY

HERE = backbone.HERE
CHECKPOINT = HERE / "backbone.safetensors"
ADAPTERS = HERE / "adapters"
IMAGES = HERE / "images"
STAGES = ("folders", "backbone", "adapters")


def train_command(name: str, cache: Path, threads: int) -> list[str]:
    """Return the ``hhdeploy train`` command of one task's adapter.

    Without augmentation, as the linear probe it is compared with.
    """
    recipe = RECIPES[name]
    folders = cache / "folders" / name
    return [
        str(Path(sys.executable).with_name("hhdeploy")), "train",
        "--model", backbone.MODEL,
        "--model-args", json.dumps(backbone.MODEL_ARGS),
        "--preprocess", json.dumps(backbone.PREPROCESS),
        "--checkpoint", str(CHECKPOINT),
        "--data", str(folders / "train"),
        "--val-data", str(folders / "val"),
        "--form", recipe.form,
        "--reflection", recipe.reflection,
        "--r", str(recipe.r),
        "--epochs", str(recipe.epochs),
        "--batch-size", str(recipe.batch_size),
        "--lr", str(recipe.learning_rate),
        "--weight-decay", str(WEIGHT_DECAY),
        "--seed", str(SEED),
        "--no-augment",
        "--threads", str(threads),
        "--num-workers", "0",
        str(ADAPTERS / name),
    ]  # fmt: skip


def make(cache: Path, redo: frozenset[str], threads: int) -> None:
    """Run the stages whose results are missing or that are to be repeated."""
    for name in TASKS:
        load_task(cache, name)
    if "folders" in redo or not IMAGES.exists() or not (cache / "folders" / TASKS[-1]).exists():
        write_folders(cache, IMAGES)
    if "backbone" in redo or not CHECKPOINT.exists():
        options = ["--cache", str(cache), "--threads", str(threads)]
        subprocess.run([sys.executable, str(HERE / "pretrain.py"), *options], check=True)
    for name in TASKS:
        out, unfinished = ADAPTERS / name, ADAPTERS / f"{name}.training"
        if "adapters" in redo:
            shutil.rmtree(out, ignore_errors=True)
            shutil.rmtree(unfinished, ignore_errors=True)
        if not out.exists():
            resume = ["--resume"] if (unfinished / "state.json").exists() else []
            subprocess.run([*train_command(name, cache, threads), *resume], check=True)
    torch.set_num_threads(threads)
    evaluate(cache, CHECKPOINT, ADAPTERS, HERE / "results.json")


def main() -> int:
    """Parse the options and make what is missing."""
    parser = argparse.ArgumentParser(description="Make the starter models from nothing.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="directory for downloads")
    parser.add_argument("--redo", action="append", choices=STAGES, default=[], metavar="STAGE")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of torch")
    options = parser.parse_args()
    try:
        make(options.cache.resolve(), frozenset(options.redo), options.threads)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        print(f"error: `{' '.join(error.cmd)}` failed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
