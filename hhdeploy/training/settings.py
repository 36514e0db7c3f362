"""What a training is asked to do and what it answers: plain values, no torch in them."""

from __future__ import annotations

import contextlib
import json
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hhdeploy.adapters.config import CLASSES, PROBLEM_TYPES, ProblemType
from hhdeploy.algebra import REFLECTIONS, Reflection
from hhdeploy.backbones.sites import FORMS, Form
from hhdeploy.choices import SEEDS, TORCH_DEVICES, TorchDevice, mapping, yes_or_no
from hhdeploy.errors import HhdeployError, OptionError
from hhdeploy.files.writing import as_path

# What the paper adapts: q, k, v and proj beside, proj and fc2 behind.
DEFAULT_TARGETS: Mapping[Form, tuple[str, ...]] = {
    "additive": ("q", "k", "v", "proj"),
    "sequential": ("proj", "fc2"),
}

_PATHS = ("data", "out", "checkpoint", "val_data", "labels", "val_labels")
_WHOLE = (
    "r",
    "epochs",
    "batch_size",
    "warmup_epochs",
    "seed",
    "num_workers",
    "threads",
    "cache_mb",
)
_SWITCHES = ("pretrained", "augment", "flip", "linear_probe", "overwrite", "resume")
_NUMBERS = ("lr", "weight_decay", "val_fraction")


def _one_of(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}"


class TrainingError(HhdeployError):
    """A training that cannot start, cannot be continued, or diverged."""


class SettingsError(TrainingError, OptionError):
    """Settings of a training that make no sense, whatever the model and the data."""


@dataclass(frozen=True)
class TrainSettings:
    """Everything that decides what `hhdeploy.training.recipe.train` does.

    Paths may be given as strings.

    Attributes:
        model: timm name, with or without ``.tag``, ``transformers:DIR_OR_HUB_ID``, or
            ``python:package.module:function``.
        data: image folder DIR/CLASS/image; with ``labels`` any folder of images.
        out: adapter directory to write; may be None for a linear probe only.
        model_args: further arguments that the model is made with.
        input_size: (channels, height, width) of the images, where the model does not say.
        preprocess: what differs from the model's own image transform, e.g.
            ``{"crop_pct": 1.0}``; the adapter carries the result.
        checkpoint: backbone weights; None: those of the source.
        pretrained: False gives a random backbone (``seed``).
        val_data: image folder with the same class names; None: part of ``data`` is held out.
        val_fraction: share of every class's pictures that is held out, in [0, 1), with all copies
            of each; 0: no validation.
        labels: CSV file of a line an image, its path below ``data`` and then its classes, with
            ``;`` between, or its values; see `hhdeploy.adapters.labels`.
        val_labels: the same of the images to validate on, below ``val_data`` (None: ``data``).
        problem_type: what ``labels`` holds; None: `hhdeploy.adapters.labels.read_labels` tells.
        form, reflection, r, targets: see `hhdeploy.adapters.config.AdapterConfig`; ``targets`` None
            stands for `DEFAULT_TARGETS`.
        epochs, batch_size: passes over the data, images a step.
        lr, weight_decay: of AdamW; ``lr`` is the peak of the schedule.
        warmup_epochs: epochs of linear warm-up before the cosine; None: a tenth of ``epochs``,
            at least one if there is more than one.
        seed: of the split, new weights, shuffling, augmentation, and a random backbone.
        augment: a mild random resized crop (`hhdeploy.training.data`), and the flip.
        flip: mirror half of the images; only with ``augment``.
        linear_probe: train the classifier alone, no sites.
        num_workers: threads that read and augment images ahead; 0: none.
        threads: torch's CPU threads during the training; None: as they are.
        device: where the model runs.
        cache_mb: MiB of decoded pixels to keep in memory; what exceeds it is read every epoch.
        overwrite: replace an existing ``out`` once the new one is complete.
        resume: continue the unfinished training of ``out``.
    """

    model: str
    data: Path
    out: Path | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    input_size: tuple[int, int, int] | None = None
    preprocess: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    pretrained: bool = True
    val_data: Path | None = None
    val_fraction: float = 0.1
    labels: Path | None = None
    val_labels: Path | None = None
    problem_type: ProblemType | None = None
    form: Form = "additive"
    reflection: Reflection = "unnormalized"
    r: int = 1
    targets: tuple[str, ...] | None = None
    epochs: int = 10
    batch_size: int = 64
    lr: float = 5e-3
    weight_decay: float = 1e-4
    warmup_epochs: int | None = None
    seed: int = 0
    augment: bool = True
    flip: bool = True
    linear_probe: bool = False
    num_workers: int = 0
    threads: int | None = None
    device: TorchDevice = "auto"
    cache_mb: int = 2048
    overwrite: bool = False
    resume: bool = False

    def __post_init__(self) -> None:
        for name in _PATHS:
            if (given := getattr(self, name)) is not None or name == "data":
                object.__setattr__(self, name, as_path(given, name, SettingsError))
        for name in _SWITCHES:
            switch = yes_or_no(getattr(self, name), name, SettingsError)
            object.__setattr__(self, name, switch)
        for name in ("model_args", "preprocess"):
            mapping(getattr(self, name), name, "names and values", SettingsError)
        # NumPy's numbers are numbers; JSON knows Python's alone.
        for name in _WHOLE:
            if not isinstance(given := getattr(self, name), bool):
                with contextlib.suppress(TypeError):
                    object.__setattr__(self, name, operator.index(given))
        for name in _NUMBERS:
            if isinstance(given := getattr(self, name), np.floating):
                object.__setattr__(self, name, float(given))

    @property
    def target_modules(self) -> tuple[str, ...]:
        """``targets``, or what the form adapts by default."""
        return self.targets or DEFAULT_TARGETS[self.form]

    @property
    def warmup(self) -> int:
        """Epochs of warm-up, the default filled in."""
        if self.warmup_epochs is not None:
            return self.warmup_epochs
        return max(1, self.epochs // 10) if self.epochs > 1 else 0

    def check(self) -> None:
        """Raise `SettingsError` naming the first setting that makes no sense."""
        self._check_types()
        rules = (
            (self.form in FORMS, "`form`", _one_of(FORMS), self.form),
            (
                self.reflection in REFLECTIONS,
                "`reflection`",
                _one_of(REFLECTIONS),
                self.reflection,
            ),
            (
                self.problem_type in (None, *PROBLEM_TYPES),
                "`problem_type`",
                _one_of(PROBLEM_TYPES),
                self.problem_type,
            ),
            (self.device in TORCH_DEVICES, "`device`", _one_of(TORCH_DEVICES), self.device),
            (self.epochs >= 1, "`epochs`", "1 or more", self.epochs),
            (self.batch_size >= 1, "`batch_size`", "1 or more", self.batch_size),
            (0 < self.lr < math.inf, "`lr`", "a positive number", self.lr),
            (0 <= self.weight_decay < math.inf, "`weight_decay`", "0 or more", self.weight_decay),
            (0 <= self.val_fraction < 1, "`val_fraction`", "a share in [0, 1)", self.val_fraction),
            (self.r >= 0, "`r`", "a rank of 0 or more", self.r),
            (SEEDS[0] <= self.seed <= SEEDS[1], "`seed`", "a number of 64 bits", self.seed),
            (self.num_workers >= 0, "`num_workers`", "0 or more", self.num_workers),
            (self.threads is None or self.threads >= 1, "`threads`", "1 or more", self.threads),
            (self.cache_mb >= 0, "`cache_mb`", "0 or more", self.cache_mb),
            (
                0 <= self.warmup < self.epochs,
                "`warmup_epochs`",
                f"less than `epochs` ({self.epochs})",
                self.warmup,
            ),
        )
        for holds, name, expected, found in rules:
            if not holds:
                raise SettingsError(f"{name}: expected {expected}, found {found}.")
        if self.out is None and (self.resume or not self.linear_probe):
            raise SettingsError(
                "no output directory was given. Only `linear_probe=True` works without `out`, and "
                "`resume=True` needs the `out` whose training it continues."
            )
        if self.labels is None and (self.val_labels or self.problem_type):
            raise SettingsError("`val_labels` and `problem_type` need `labels`.")
        if self.labels is not None and self.val_data is not None and self.val_labels is None:
            raise SettingsError("`val_data` needs `val_labels` where `labels` are given.")
        if self.checkpoint is not None and not self.pretrained:
            raise SettingsError("`checkpoint` and `pretrained=False` exclude each other: give one.")

    def _check_types(self) -> None:
        """What is compared, or written once an epoch is done, can be."""
        whole, number = (int, "a whole number"), (int | float, "a number")
        perhaps = (int | None, "a whole number")
        rules: tuple[tuple[Any, tuple[Any, str], str], ...] = (
            (self.r, whole, "`r`"),
            (self.epochs, whole, "`epochs`"),
            (self.batch_size, whole, "`batch_size`"),
            (self.warmup_epochs, perhaps, "`warmup_epochs`"),
            (self.seed, whole, "`seed`"),
            (self.num_workers, whole, "`num_workers`"),
            (self.threads, perhaps, "`threads`"),
            (self.cache_mb, whole, "`cache_mb`"),
            (self.lr, number, "`lr`"),
            (self.weight_decay, number, "`weight_decay`"),
            (self.val_fraction, number, "`val_fraction`"),
        )
        for found, (types, expected), name in rules:
            if isinstance(found, bool) or not isinstance(found, types):
                raise SettingsError(f"{name}: expected {expected}, found {found!r}.")
        try:
            json.dumps(dict(self.model_args) if self.out is not None else {})
        except (TypeError, ValueError) as error:
            raise SettingsError(
                f"`model_args`: expected values that can be written as JSON, found "
                f"{dict(self.model_args)}: {error}."
            ) from error


@dataclass(frozen=True)
class StepReport:
    """One optimizer step: epoch and step count from 1, ``loss`` before the step, ``lr`` of it."""

    epoch: int
    step: int
    steps: int
    loss: float
    lr: float


@dataclass(frozen=True)
class EpochReport:
    """One epoch, counted from 1.

    Attributes:
        loss: mean loss of the training images, as the weights moved.
        lr: of the epoch's last step.
        val_top1: share of the validation images classified right after the epoch; None
            without validation, and of other truths than classes.
        val_loss: mean loss of the validation images; None without validation.
        val_map: the same as ``val_top1`` of labels: mean average precision, a share; None also
            where no label is true of any validation image.
        val_mae: and of values: mean absolute error, in their own unit.
    """

    epoch: int
    loss: float
    lr: float
    val_top1: float | None
    val_loss: float | None
    val_map: float | None = None
    val_mae: float | None = None

    @property
    def quality(self) -> float | None:
        """The one of the three scores that there is, so that more is better."""
        if self.val_mae is not None:
            return -self.val_mae
        return self.val_top1 if self.val_top1 is not None else self.val_map

    def __str__(self) -> str:
        """Its score in words, ``top-1 81.3 %``."""
        if self.val_mae is not None:
            return f"MAE {self.val_mae:.4g}"
        if self.val_top1 is not None:
            return f"top-1 {100 * self.val_top1:.1f} %"
        if self.val_map is not None:
            return f"mAP {100 * self.val_map:.1f} %"
        # Of images the mean average precision alone may have none.
        return "n/a" if self.val_loss is None else "mAP n/a"


OnReport = Callable[[StepReport | EpochReport], None]


@dataclass(frozen=True)
class TrainResult:
    """What was trained. The weights written are those of the last epoch, as in the paper.

    Attributes:
        out: the directory that was written, None if none was asked for.
        linear_probe: True when only the classifier was trained.
        class_names: in the order of the logits.
        train_images, val_images: sizes of the data.
        train_data, val_data: the folders that they are from, the same one if a part was held out.
        skipped: files of these folders that were left out: what they are -> how many.
        sites: adapted sites; 0 for a linear probe.
        parameters: trained values before the classifier.
        head_parameters: trained values of the classifier.
        device: ``cpu`` or ``cuda``.
        history: one report an epoch, those before a resume included.
        problem_type: what is true of the images.
        notes: what had to be assumed of the backbone, a line each.
        val_images_trained_on: validation images whose picture is trained on too, under whatever
            name: the scores are flattered by them.
        contrary_pictures: pictures of several classes, or of different labels or values.
        unread: folders beside ``train_data`` of which nothing was read, such as DIR/test.
    """

    out: Path | None
    linear_probe: bool
    class_names: tuple[str, ...]
    train_images: int
    val_images: int
    train_data: Path
    val_data: Path
    skipped: Mapping[str, int]
    sites: int
    parameters: int
    head_parameters: int
    device: str
    history: tuple[EpochReport, ...]
    problem_type: ProblemType = CLASSES
    notes: tuple[str, ...] = ()
    val_images_trained_on: int = 0
    contrary_pictures: int = 0
    unread: tuple[Path, ...] = ()

    @property
    def last(self) -> EpochReport:
        """The epoch whose weights are written."""
        return self.history[-1]

    @property
    def best(self) -> EpochReport | None:
        """The (first) epoch of the best validation score; None without validation."""
        known = [e for e in self.history if e.quality is not None]
        return max(known, key=lambda e: (e.quality, -e.epoch)) if known else None

    def to_json(self) -> dict[str, Any]:
        """The JSON form that ``--json`` prints and a linear probe's metrics.json holds."""
        best = self.best
        return {
            "out": str(self.out) if self.out is not None else None,
            "linear_probe": self.linear_probe,
            "class_names": list(self.class_names),
            "train_images": self.train_images,
            "val_images": self.val_images,
            "val_images_trained_on": self.val_images_trained_on,
            "contrary_pictures": self.contrary_pictures,
            "train_data": str(self.train_data),
            "val_data": str(self.val_data),
            "skipped": dict(self.skipped),
            "unread": [str(folder) for folder in self.unread],
            "sites": self.sites,
            "parameters": self.parameters,
            "head_parameters": self.head_parameters,
            "device": self.device,
            "val_top1": self.last.val_top1,
            "problem_type": self.problem_type,
            "val_map": self.last.val_map,
            "val_mae": self.last.val_mae,
            "best_val_top1": best.val_top1 if best else None,
            "best_epoch": best.epoch if best else None,
            "history": [asdict(epoch) for epoch in self.history],
        }
