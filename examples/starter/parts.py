"""The parts of each task that training and evaluation use, and their image folders.

``train`` and ``val`` are cut from a task's training split, ``test`` from its test split. Learning
rates are chosen on ``val``; ``test`` is only for the figures that are reported.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fetch_data import SEED, Task, load_task
from PIL import Image

TASKS = ("digits", "fashion", "emoji", "textures")
"""The tasks with an adapter. ``faces`` only serves pre-training: its photos of people carry no
licence of their own, so the repository holds none of them."""

VAL_SHARE = 0.15
LIMITS = {"train": 5000, "val": 1000, "test": 2000}
SHIPPED = 96


@dataclass(frozen=True)
class Part:
    """Images, uint8 [n, height, width(, 3)], and labels, int64 [n]."""

    images: np.ndarray
    labels: np.ndarray


def _balanced(labels: np.ndarray, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Return up to ``limit`` indices, sorted: each class's share is the same, or all it has."""
    by_class = [rng.permutation(np.flatnonzero(labels == label)) for label in np.unique(labels)]
    share = max(1, limit // len(by_class))
    if len(labels) <= limit:
        share = len(labels)
    return np.sort(np.concatenate([indices[:share] for indices in by_class]))


def split(task: Task) -> dict[str, Part]:
    """Return the parts train, val and test; variants of one image are in one part."""
    rng = np.random.default_rng(SEED + 1)
    held = np.zeros(len(task.train_labels), dtype=bool)
    for label in np.unique(task.train_labels):
        groups = np.unique(task.train_groups[task.train_labels == label])
        chosen = rng.permutation(groups)[: round(len(groups) * VAL_SHARE)]
        held |= np.isin(task.train_groups, chosen) & (task.train_labels == label)
    pools = {
        "train": Part(task.train_images[~held], task.train_labels[~held]),
        "val": Part(task.train_images[held], task.train_labels[held]),
        "test": Part(task.test_images, task.test_labels),
    }
    parts = {}
    for name, pool in pools.items():
        kept = _balanced(pool.labels, LIMITS[name], rng)
        parts[name] = Part(pool.images[kept], pool.labels[kept])
    return parts


def shipped(test: Part) -> Part:
    """Return the few balanced test images that the repository holds."""
    rng = np.random.default_rng(SEED + 2)
    kept = _balanced(test.labels, SHIPPED, rng)
    return Part(test.images[kept], test.labels[kept])


def write_folder(part: Part, class_names: np.ndarray, directory: Path) -> None:
    """Write ``directory/CLASS/NNN.png``, replacing the directory."""
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts = np.zeros(len(class_names), dtype=int)
    for image, label in zip(part.images, part.labels, strict=True):
        target = partial / str(class_names[label]) / f"{counts[label]:03d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(target, optimize=True)
        counts[label] += 1
    shutil.rmtree(directory, ignore_errors=True)
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial.replace(directory)


def write_folders(cache: Path, images: Path) -> None:
    """Write ``cache/folders/TASK/PART`` for every part, and ``images/TASK`` for the repository."""
    for name in TASKS:
        task = load_task(cache, name)
        parts = split(task)
        for part_name, part in parts.items():
            write_folder(part, task.class_names, cache / "folders" / name / part_name)
        few = shipped(parts["test"])
        write_folder(few, task.class_names, images / name)
        sizes = ", ".join(f"{len(part.labels)} {key}" for key, part in parts.items())
        print(f"{name}: {sizes}, {len(few.labels)} of them in the repository", flush=True)
