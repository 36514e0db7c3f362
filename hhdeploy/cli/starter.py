"""The demo's work: fold one starter adapter, keep all as side branches, verify, classify, time."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hhdeploy.errors import DataError
from hhdeploy.exporting.bundles import ExportResult, export
from hhdeploy.files.folders import list_classes
from hhdeploy.plan import Reserve
from hhdeploy.preprocess import open_image
from hhdeploy.runtime import Session, open_session
from hhdeploy.timing import Paired, paired

_BATCH = 16


@dataclass(frozen=True)
class Starter:
    """The starter models: a small pre-trained ViT and adapters for several real tasks.

    Attributes:
        path: the directory.
        model: timm name.
        args: of ``timm.create_model``.
        tasks: names of the adapters.
    """

    path: Path
    model: str
    args: Mapping[str, Any]
    tasks: tuple[str, ...]

    @classmethod
    def read(cls, examples: Path) -> Starter:
        """Read ``backbone.json``. Raises `DataError` when the directory has none."""
        try:
            content = json.loads((examples / "backbone.json").read_text(encoding="utf-8"))
            tasks = tuple(sorted(d.name for d in (examples / "adapters").iterdir() if d.is_dir()))
            model, args = content["model"], dict(content["model_args"])
        except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise DataError(
                f"{examples} has no starter models: expected backbone.json there, with model and "
                f"model_args, and a folder of adapters; found {said}. They are in examples/starter "
                "of the source repository: pass --examples DIR."
            ) from error
        if not tasks:
            raise DataError(
                f"{examples / 'adapters'} holds no adapter: expected a folder for each task."
            )
        return cls(examples, model, args, tasks)

    def adapter(self, task: str) -> Path:
        """An adapter's directory."""
        return self.path / "adapters" / task

    def images(self, task: str) -> Mapping[str, tuple[Path, ...]]:
        """Class -> held-out test images that ship with the repository."""
        return list_classes(self.path / "images" / task).paths


@dataclass(frozen=True)
class Sample:
    """One test image: its task, file and true class."""

    task: str
    path: Path
    truth: str


@dataclass(frozen=True)
class Prediction:
    """A sample and what its adapter said."""

    sample: Sample
    predicted: str
    probability: float

    @property
    def right(self) -> bool:
        """The predicted class is the true one."""
        return self.predicted == self.sample.truth


@dataclass(frozen=True)
class DemoResult:
    """Everything that the demo prints."""

    folded: ExportResult
    branches: ExportResult
    answers: tuple[Prediction, ...]
    cost: Mapping[int, Paired]

    def accuracy(self, task: str) -> tuple[int, int]:
        """Right answers and images of a task."""
        own = [a.right for a in self.answers if a.sample.task == task]
        return sum(own), len(own)


def run_demo(
    starter: Starter, out: Path, threads: int | None, progress: Callable[[str], None]
) -> DemoResult:
    """Export the first task folded and all as side branches, classify, time.

    Raises:
        HhdeployError: whatever `export` and the session raise.
    """
    common: dict[str, Any] = {
        "model_args": starter.args,
        "checkpoint": starter.path / "backbone.safetensors",
        "verify_data": starter.path / "images",
        "verify_images": 8,
        "overwrite": True,
    }
    first = starter.tasks[0]
    progress(f"folding {first} into the weights, verified")
    folded = export(
        starter.model, {first: starter.adapter(first)}, out / f"{first}-folded", fold=True, **common
    )
    progress(f"exporting {', '.join(starter.tasks)} as side branches of one graph, verified")
    branches = export(
        starter.model,
        {task: starter.adapter(task) for task in starter.tasks},
        out / "all-tasks",
        reserve=Reserve(keep_backbone_head=True),
        precisions=("float16",),
        **common,
    )
    with (
        open_session(folded.path, device="cpu", threads=threads) as plain,
        open_session(branches.path, device="cpu", threads=threads) as session,
    ):
        progress("classifying: every batch mixes all tasks")
        answers = classify(session, samples(starter))
        progress("timing side branches against the folded graph")
        cost = {batch: side_branch_cost(plain, session, batch) for batch in (1, 8)}
    return DemoResult(folded, branches, answers, cost)


def samples(starter: Starter) -> list[Sample]:
    """All test images, the tasks taken in turn so that any batch mixes them."""
    per_task = [
        [Sample(task, p, name) for name, paths in starter.images(task).items() for p in paths]
        for task in starter.tasks
    ]
    rng = np.random.default_rng(0)
    for own in per_task:
        rng.shuffle(own)  # type: ignore[arg-type]
    longest = max(len(own) for own in per_task)
    return [own[i] for i in range(longest) for own in per_task if i < len(own)]


def classify(session: Session, items: list[Sample]) -> tuple[Prediction, ...]:
    """Each image with its own task's adapter, in mixed batches."""
    answers = []
    for start in range(0, len(items), _BATCH):
        batch = items[start : start + _BATCH]
        found = session.classify([open_image(s.path) for s in batch], [s.task for s in batch])
        answers += [
            Prediction(sample, best.label, best.score)
            for sample, (best, *_) in zip(batch, found, strict=True)
        ]
    return tuple(answers)


def side_branch_cost(folded: Session, branches: Session, batch: int) -> Paired:
    """Side branches (mixed adapters) against the folded graph, in turn."""
    size = branches.bundle.manifest.input_size
    images = np.random.default_rng(0).standard_normal((batch, *size), np.float32)
    names = list(branches.adapters)
    mixed = [names[i % len(names)] for i in range(batch)]
    return paired(
        lambda: branches.run(images, mixed), lambda: folded.run(images), pairs=50, warmup=5
    )
