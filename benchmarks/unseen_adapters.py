"""INT8 and adapters that came after the calibration: what each loses, and whether its check tells.

    python -m benchmarks.unseen_adapters [--out DIR] [--only NAME ...]

A ViT-S/14 with four adapters is calibrated in INT8 on images of these four; twenty more are added
that the calibration never saw. All 24 are trained here, on weights and images of examples/vits14,
which fetches them. For each: top-1 of the float32 and the INT8 graph in ONNX Runtime on held-out
images, and what can be known without labels from images that it was trained on: how far they leave
the calibrated ranges (`calibrate --check`), and how many answers of the two graphs differ.

An adapter counts as dropped if it loses more than a point of top-1 and an exact McNemar test, one
side, gives p < 0.05. What is there in DIR is not made again: a run that was stopped goes on.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from PIL import Image, ImageOps

from benchmarks.harness import report, work_directory
from hhdeploy.bundle import Bundle, add_adapter
from hhdeploy.bundle.manifest import calibration_files
from hhdeploy.calibration.data import CalibrationData
from hhdeploy.calibration.judging.range_check import check_adapter
from hhdeploy.calibration.quantised import Float32Graph, find_scales, quantise
from hhdeploy.calibration.scales import write_scales
from hhdeploy.calibration.settings import CalibrationSettings
from hhdeploy.exporters.writer import save_graph
from hhdeploy.exporting.bundles import export
from hhdeploy.files.folders import list_classes, list_images, spread
from hhdeploy.files.writing import write_json
from hhdeploy.parity import compare
from hhdeploy.plan import Reserve
from hhdeploy.preprocess import open_image
from hhdeploy.runtime import Session, open_session
from hhdeploy.training.recipe import train
from hhdeploy.training.settings import TrainSettings
from hhdeploy.verifying.graphs import add_graph

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "vits14" / "run.py"
MODEL, PIXELS = "vit_small_patch14_dinov2", 42
TRAIN_IMAGES, TEST_IMAGES, EPOCHS, BATCH = 144, 120, 2, 16
CHECK_IMAGES = 24
POINTS, CHANCE = 1.0, 0.05
ONE_THREAD = 1

TOPS = ("coat", "dress", "pullover", "shirt", "t-shirt")
SHOES = ("ankle-boot", "sandal", "sneaker")
LIVING = ("animals-nature", "people-body", "smileys-emotion", "food-drink")
THINGS = ("activities", "flags", "objects", "symbols", "travel-places")


@dataclass(frozen=True)
class Task:
    """An adapter to train.

    Attributes:
        source: data set of the example.
        labels: label -> classes of the source that bear it; none: every class its own.
        negative: bright and dark change places.
        seed: of images, new weights and order.
        lr: peak learning rate.
        r: rank of the low-rank term.
    """

    source: str
    labels: Mapping[str, Sequence[str]] | None = None
    negative: bool = False
    seed: int = 0
    lr: float = 5e-3
    r: int = 1


def _own(classes: Sequence[str]) -> dict[str, Sequence[str]]:
    return {name: (name,) for name in classes}


CALIBRATED = {
    "digits": Task("digits"),
    "digits-even": Task("digits", {"even": "02468", "odd": "13579"}),
    "fashion": Task("fashion"),
    "fashion-shoes": Task("fashion", {"shoes": SHOES, "clothes": (*TOPS, "trouser", "bag")}),
}
UNSEEN = {
    "digits-again": Task("digits", seed=1),
    "digits-0-4": Task("digits", _own("01234")),
    "digits-loops": Task("digits", {"loops": "0689", "none": "12357"}),
    "digits-negative": Task("digits", negative=True),
    "digits-r8": Task("digits", r=8),
    "digits-fast": Task("digits", lr=2e-2),
    "digits-faster": Task("digits", lr=5e-2),
    "fashion-again": Task("fashion", seed=1),
    "fashion-tops": Task("fashion", _own(TOPS)),
    "fashion-negative": Task("fashion", negative=True),
    "fashion-fast": Task("fashion", lr=2e-2),
    "emoji": Task("emoji"),
    "emoji-living": Task("emoji", _own(LIVING)),
    "emoji-things": Task("emoji", {"living": LIVING, "things": THINGS}),
    "emoji-negative": Task("emoji", negative=True),
    "emoji-fast": Task("emoji", lr=2e-2),
    "emoji-faster": Task("emoji", lr=5e-2),
    "solar": Task("solar"),
    "solar-negative": Task("solar", negative=True),
    "solar-fast": Task("solar", lr=2e-2),
}


@dataclass(frozen=True)
class Result:
    """What was found of one adapter.

    Attributes:
        name, calibrated: which, and whether the calibration saw it.
        classes, test_images: it was judged on.
        float32, int8: top-1 in percent.
        p: of the losses, by chance alone.
        flagged: by `calibrate --check`.
        clipped: the largest share of a site's values that is clipped.
        clipped_mean: mean of all sites.
        ratio: the largest value over its site's range.
        lost: the largest share of a site's energy that clipping takes away.
        changed: share of the check's images that the graphs answer differently.
        sqnr_db: signal to noise of the INT8 graph's logits on the check's images.
        test_changed: as ``changed``, on the test images.
    """

    name: str
    calibrated: bool
    classes: int
    test_images: int
    float32: float
    int8: float
    p: float
    flagged: bool
    clipped: float
    clipped_mean: float
    ratio: float
    lost: float
    changed: float
    sqnr_db: float
    test_changed: float

    @property
    def drop(self) -> float:
        """Points of top-1 that INT8 costs."""
        return self.float32 - self.int8

    @property
    def dropped(self) -> bool:
        """As this module's docstring defines it."""
        return self.drop > POINTS and self.p < CHANCE


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="For all files.")
@click.option("--only", multiple=True, help="Of the unseen adapters; all four calibrated are made.")
def main(out: Path | None, only: Sequence[str]) -> None:
    out = (out or work_directory() / "unseen").resolve()
    unseen = {name: UNSEEN[name] for name in only or UNSEEN}
    tasks = {**CALIBRATED, **unseen}
    if not all((out / "data" / task.source / "test").exists() for task in tasks.values()):
        command = [sys.executable, str(EXAMPLE), "--out", str(out), "--prepare"]
        subprocess.run(command, check=True)
    for name, task in tasks.items():
        make_folders(out, name, task)
        train_adapter(out, name, task)
    bundle = make_bundle(out, list(unseen))
    results = judged(out, bundle, list(tasks))
    report("unseen_adapters", summary(results), threads=ONE_THREAD)


def make_folders(out: Path, name: str, task: Task) -> None:
    """``out/tasks/NAME/{train,test}/LABEL/CLASS-image``, unless they exist."""
    rng = np.random.default_rng(task.seed)
    for side, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        classes = list_classes(out / "data" / task.source / side).paths
        labels = task.labels or _own(list(classes))
        found = [
            (label, own, path) for label, owns in labels.items() for own in owns
            for path in classes[own]
        ]  # fmt: skip
        target = out / "tasks" / name / side
        if target.is_dir():
            continue
        partial = target.with_name(f"{side}.partial")
        for index in rng.permutation(len(found))[:count]:
            label, own, path = found[index]
            copy = partial / label / f"{own}-{path.name}"
            copy.parent.mkdir(parents=True, exist_ok=True)
            if task.negative:
                ImageOps.invert(Image.open(path)).save(copy)
            elif not copy.is_symlink():
                copy.symlink_to(os.path.relpath(path, copy.parent))
        partial.rename(target)


def train_adapter(out: Path, name: str, task: Task) -> None:
    """Train, as the example does but for fewer steps, unless it is trained."""
    adapter = out / "adapters" / name
    if adapter.exists():
        return
    settings = TrainSettings(
        model=MODEL,
        model_args={"img_size": PIXELS},
        checkpoint=out / "checkpoint.safetensors",
        data=out / "tasks" / name / "train",
        out=adapter,
        val_fraction=0.0,
        r=task.r,
        epochs=EPOCHS,
        batch_size=BATCH,
        lr=task.lr,
        seed=task.seed,
        augment=False,
        threads=ONE_THREAD,
        device="cpu",
        resume=(out / "adapters" / f"{name}.training" / "state.json").exists(),
    )
    print(f"training {name}", flush=True)
    train(settings)


def make_bundle(out: Path, unseen: Sequence[str]) -> Path:
    """Four adapters, calibrated on images that they were trained on; then the others are added."""
    path = out / "bundle"
    if not path.exists():
        export(
            MODEL,
            {name: out / "adapters" / name for name in CALIBRATED},
            path,
            model_args={"img_size": PIXELS},
            checkpoint=out / "checkpoint.safetensors",
            reserve=Reserve(max_rank=2 + max(t.r for t in UNSEEN.values()), max_classes=10),
            verify=False,
            cache=None,
        )
    for name in CALIBRATED:
        link = out / "calibration" / name
        link.parent.mkdir(exist_ok=True)
        if not link.exists():
            link.symlink_to(Path("..") / "tasks" / name / "train")
    if "int8" not in Bundle.open(path).manifest.graphs:
        print("calibrating", flush=True)
        calibrate(path, out)
    there = {entry.name for entry in Bundle.open(path).manifest.adapters}
    for name in unseen:
        if name not in there:
            add_adapter(path, name, out / "adapters" / name)
    return path


def calibrate(path: Path, out: Path) -> None:
    """As `hhdeploy calibrate` does, unjudged: that is what comes after."""
    bundle, settings = Bundle.open(path), CalibrationSettings()
    graph = Float32Graph.open(bundle)
    data = CalibrationData.open(
        bundle, out / "calibration", images=settings.images, seed=settings.seed
    )
    scales = find_scales(graph, data, settings, cache=out / "scales")
    quantised = quantise(graph, scales, settings)
    findings_file, scales_file = calibration_files("int8")
    add_graph(
        bundle,
        "int8",
        lambda target: save_graph(quantised.model, target),
        lambda trial: [],
        {
            findings_file: lambda target: write_json(target, quantised.to_json()),
            scales_file: lambda target: write_scales(target, scales.sites),
        },
    )


def judged(out: Path, bundle: Path, names: Sequence[str]) -> list[Result]:
    """The figures of all adapters, each kept in ``out/results``."""
    with contextlib.ExitStack() as stack:
        plain, low = (
            stack.enter_context(
                open_session(bundle, device="cpu", precision=precision, threads=ONE_THREAD)
            )
            for precision in ("float32", "int8")
        )
        return [_judged(out, bundle, name, plain, low) for name in names]


def _judged(out: Path, bundle: Path, name: str, plain: Session, low: Session) -> Result:
    file = out / "results" / f"{name}.json"
    if file.is_file():
        return Result(**json.loads(file.read_text(encoding="utf-8")))
    print(f"judging {name}", flush=True)
    folders = out / "tasks" / name
    checked = check_adapter(bundle, name, folders / "train", precision="int8", images=CHECK_IMAGES)
    files = spread(list_images(folders / "train").paths, CHECK_IMAGES)
    known, known_low = (_logits(session, name, files) for session in (plain, low))
    test = list_classes(folders / "test").paths
    files = [path for paths in test.values() for path in paths]
    truths = np.repeat(np.arange(len(test)), [len(paths) for paths in test.values()])
    answers, answers_low = (_logits(session, name, files).argmax(1) for session in (plain, low))
    right, still = answers == truths, answers_low == truths
    result = Result(
        name=name,
        calibrated=name in CALIBRATED,
        classes=len(test),
        test_images=len(truths),
        float32=round(100 * float(right.mean()), 2),
        int8=round(100 * float(still.mean()), 2),
        p=mcnemar(int((right & ~still).sum()), int((~right & still).sum())),
        flagged=bool(checked.clipped),
        clipped=max((site.clipped for site in checked.excess), default=0.0),
        clipped_mean=sum(site.clipped for site in checked.excess) / checked.sites,
        ratio=max((site.ratio for site in checked.excess), default=1.0),
        lost=max((site.lost for site in checked.excess), default=0.0),
        changed=float(np.mean(known.argmax(1) != known_low.argmax(1))),
        sqnr_db=round(compare(known, known_low).sqnr_db, 2),
        test_changed=float(np.mean(answers != answers_low)),
    )
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(asdict(result)) + "\n", encoding="utf-8")
    return result


def _logits(session: Session, name: str, files: Sequence[Path]) -> np.ndarray:
    """float32 [n, the adapter's classes]."""
    entry = session.entry(name)
    assert entry is not None
    images = np.stack([entry.preprocess(open_image(file)) for file in files])
    starts = range(0, len(images), BATCH)
    parts = [session.run(images[at : at + BATCH], adapters=name) for at in starts]
    return np.concatenate(parts)[:, : entry.classes]


def mcnemar(lost: int, won: int) -> float:
    """How probable at least ``lost`` losses are, where losses and wins are equally likely."""
    pairs = lost + won
    return sum(math.comb(pairs, k) for k in range(lost, pairs + 1)) / 2**pairs


# Statistic -> the values above (`sqnr_db`: below) which it would warn.
THRESHOLDS: Mapping[str, Sequence[float]] = {
    "clipped": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "clipped_mean": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "lost": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "ratio": (1.2, 1.5, 2.0, 3.0, 5.0),
    "changed": (0.0, 0.02, 0.04, 0.08),
    "sqnr_db": (25.0, 22.0, 20.0, 18.0, 15.0),
}


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Of all adapters and of the check as the predictor of a drop of the unseen ones."""
    unseen = [result for result in results if not result.calibrated]
    drops = [result.drop for result in unseen]
    return {
        "trained": {
            "model": MODEL, "pixels": PIXELS, "images": TRAIN_IMAGES, "epochs": EPOCHS,
            "batch": BATCH, "threads": ONE_THREAD,
        },
        "dropped means": f"more than {POINTS:g} point, McNemar one-sided p < {CHANCE:g}",
        "check images": CHECK_IMAGES,
        "unseen": len(unseen),
        "mean drop": round(float(np.mean(drops)), 3),
        "worst drop": round(max(drops), 2),
        "dropped": [result.name for result in unseen if result.dropped],
        "check": precision_and_recall(unseen, [result.flagged for result in unseen]),
        "flagged of the calibrated": sum(r.flagged for r in results if r.calibrated),
        "statistics": {name: judge_statistic(unseen, name) for name in THRESHOLDS},
        "adapters": [
            {**asdict(result), "drop": round(result.drop, 2), "dropped": result.dropped}
            for result in results
        ],
    }  # fmt: skip


def precision_and_recall(results: Sequence[Result], flags: Sequence[bool]) -> dict[str, Any]:
    """None: nothing was flagged, or nothing dropped."""
    flagged = sum(flags)
    dropped = sum(result.dropped for result in results)
    both = sum(result.dropped and flag for result, flag in zip(results, flags, strict=True))
    return {
        "flagged": flagged,
        "precision": round(both / flagged, 3) if flagged else None,
        "recall": round(both / dropped, 3) if dropped else None,
    }


def judge_statistic(results: Sequence[Result], name: str) -> dict[str, Any]:
    """At several bounds, and its rank correlations with the drop and the answers changed."""
    sign = -1.0 if name == "sqnr_db" else 1.0
    values = [sign * getattr(result, name) for result in results]
    drops, changed = [r.drop for r in results], [r.test_changed for r in results]
    return {
        "rank correlation with the drop": rank_correlation(values, drops),
        "rank correlation with answers changed": rank_correlation(values, changed),
        "at": {
            f"{bound:g}": precision_and_recall(results, [v > sign * bound for v in values])
            for bound in THRESHOLDS[name]
        },
    }


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's, equal values sharing their mean rank; None: all values of one are equal."""
    ranks = []
    for values in map(np.asarray, (first, second)):
        below = (values[:, None] > values).sum(1) + (values[:, None] >= values).sum(1)
        if not np.ptp(below):
            return None
        ranks.append(below)
    return round(float(np.corrcoef(*ranks)[0, 1]), 3)


if __name__ == "__main__":
    main()
