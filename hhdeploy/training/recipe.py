"""The paper's recipe: an image folder in, an adapter directory out.

AdamW on the adapter and a new classifier, linear warm-up and cosine, cross-entropy; the
backbone is frozen and in eval mode. The weights of the last epoch are written, as in the paper
(the best epoch is reported beside it). On a CPU, one seed and one number of threads give the
same bits, interrupted and resumed or not.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from hhdeploy.adapters.checks import check_sites
from hhdeploy.adapters.config import CLASSES, AdapterConfig
from hhdeploy.adapters.directory import ADAPTER, METRICS_FILE
from hhdeploy.adapters.format import Adapter, save_adapter
from hhdeploy.backbones.facts import BackboneFacts
from hhdeploy.backbones.loading import load_backbone
from hhdeploy.backbones.spec import Backbone, BackboneSpec
from hhdeploy.backbones.transformers import with_classifier
from hhdeploy.choices import TorchDevice, of_kind
from hhdeploy.errors import WriteError
from hhdeploy.files.directories import atomic_directory, check_target
from hhdeploy.files.outputs import check_outside
from hhdeploy.files.writing import write_json
from hhdeploy.packages import own_version
from hhdeploy.preprocess import Preprocess
from hhdeploy.training.attach import attach, base_answer_of, extract
from hhdeploy.training.data import (
    CROP_AREA,
    CROP_RATIO,
    BatchSource,
    ImageFolder,
    PixelCache,
    derived_seed,
    read_image_folder,
)
from hhdeploy.training.heads import check_place, linear_of, replace_module
from hhdeploy.training.labelled import read_labelled
from hhdeploy.training.loop import Trainer
from hhdeploy.training.objective import Objective
from hhdeploy.training.settings import (
    EpochReport,
    OnReport,
    StepReport,
    TrainingError,
    TrainResult,
    TrainSettings,
)
from hhdeploy.training.state import ANSWER, SavedTraining, StateDirectory

__all__ = [
    "EpochReport",
    "OnReport",
    "StepReport",
    "TrainResult",
    "TrainSettings",
    "TrainingError",
    "train",
]

_HEAD_STD = 0.02


@dataclass(frozen=True)
class _Task:
    """What one call of `train` works on."""

    settings: TrainSettings
    folder: ImageFolder
    facts: BackboneFacts
    model: nn.Module
    state: StateDirectory | None

    @property
    def identity(self) -> dict[str, Any]:
        """What a resumed training must share with the interrupted one, by its name."""
        s = self.settings
        return {
            "`model`": self.facts.model,
            "`model_args`": dict(self.facts.args),
            "`preprocess`": self.facts.preprocess.to_json(),
            "the digest of the backbone's weights": self.facts.sha256,
            "the digest of the backbone's buffers": self.facts.buffers,
            ANSWER: None if s.linear_probe else base_answer_of(self.model),
            "`problem_type`": self.folder.problem_type,
            "the digest of the image names and sizes": self.folder.digest,
            "the list of class names": list(self.folder.class_names),
            "`form`": s.form,
            "`reflection`": s.reflection,
            "`r`": s.r,
            "`targets`": s.target_modules,
            "`epochs`": s.epochs,
            "`batch_size`": s.batch_size,
            "`lr`": s.lr,
            "`weight_decay`": s.weight_decay,
            "`warmup_epochs`": s.warmup,
            "`seed`": s.seed,
            "`augment`": s.augment,
            "`flip`": s.flip,
            "`linear_probe`": s.linear_probe,
        }


def train(settings: TrainSettings, progress: OnReport | None = None) -> TrainResult:
    """Train an adapter (or a linear probe) on an image folder and write it.

    Args:
        settings: what to do.
        progress: called with every `StepReport` and `EpochReport`. After each epoch the state
            is on disk before the call, so an exception raised there loses nothing.

    Returns:
        The result; ``result.out`` holds the adapter, or metrics.json for a linear probe.

    Raises:
        TrainingError: settings that make no sense, an unfinished state without ``resume``, a
            state of other settings, another training into ``out`` that runs, a diverged loss, a
            device that is not there.
        DataError: the image folders or an image.
        BackboneError: the model or its checkpoint.
        AdapterError: targets that the model does not have, or where the form cannot act.
        PlanError: a model without a single Linear that adapters can change.
        WriteError: ``out`` cannot be written; checked before the training starts.
    """
    of_kind(settings, TrainSettings, "settings").check()
    device, spec = _device(settings.device), _backbone_spec(settings)
    with _output(settings) as state, _torch_threads(settings.threads):
        folder = _data(settings)
        backbone = _with_preprocess(load_backbone(with_classifier(spec)), settings.preprocess)
        backbone.model.to(device)
        model = _trainable(backbone, settings, folder)
        task = _Task(settings, folder, backbone.facts, model, state)
        with BatchSource(
            backbone.facts.preprocess,
            batch_size=settings.batch_size,
            cache=PixelCache(settings.cache_mb << 20),
            workers=settings.num_workers,
        ) as batches:
            trainer = Trainer(model, settings, folder, batches, device)
            history = _run(task, trainer, progress or (lambda report: None))
        result = replace(_result(task, trainer, history), notes=backbone.notes)
        _write(task, result, trainer.objective)
    return result


def _data(settings: TrainSettings) -> ImageFolder:
    if settings.labels is not None:
        return read_labelled(settings, settings.labels)
    return read_image_folder(settings.data, settings.val_data, settings.val_fraction, settings.seed)


@contextmanager
def _output(settings: TrainSettings) -> Iterator[StateDirectory | None]:
    """Hold the output; one that exists or cannot be written is refused before any work is done."""
    out = settings.out
    if out is None:
        yield None
        return
    check_outside(out)  # which is a folder where it is to be, too
    state = StateDirectory.beside(out)
    with state.held():
        check_target(out, ADAPTER, overwrite=settings.overwrite)
        state.check(resume=settings.resume)
        try:
            yield state
        except WriteError as error:
            if not state.exists:
                raise
            raise WriteError(
                f"{error} The epochs before are kept in {state.path}: go on with `resume=True`."
            ) from error


def _device(name: TorchDevice) -> torch.device:
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise TrainingError("`device='cuda'`: torch sees no CUDA device here. Use `device='cpu'`.")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


@contextmanager
def _torch_threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _backbone_spec(settings: TrainSettings) -> BackboneSpec:
    return BackboneSpec(
        settings.model,
        settings.model_args,
        settings.checkpoint,
        pretrained=settings.pretrained,
        seed=settings.seed,
        input_size=settings.input_size,
    )


def _with_preprocess(backbone: Backbone, changes: Mapping[str, Any]) -> Backbone:
    """The backbone with fields of its evaluation transform replaced."""
    if unknown := set(changes) - set(backbone.facts.preprocess.to_json()):
        raise TrainingError(
            f"`preprocess`: unknown {', '.join(sorted(unknown))}; expected some of "
            f"{', '.join(backbone.facts.preprocess.to_json())}."
        )
    try:
        changed = Preprocess.stated({**backbone.facts.preprocess.to_json(), **changes})
    except (ValueError, TypeError) as error:
        raise TrainingError(f"`preprocess`: {error}") from error
    if changed.input_size != backbone.facts.preprocess.input_size:
        raise TrainingError(
            "`preprocess`: input_size is the model's; change it with `model_args`, for example "
            "`model_args={'img_size': 384}`."
        )
    return replace(backbone, facts=replace(backbone.facts, preprocess=changed))


def _trainable(backbone: Backbone, settings: TrainSettings, folder: ImageFolder) -> nn.Module:
    """The model with a new classifier and, unless it is a probe, a new adapter. Mutates it."""
    seed = derived_seed(settings.seed, "weights")
    facts, classes = backbone.facts, len(folder.class_names)
    if not facts.classifier:
        raise TrainingError(
            f"`model`: expected a model with a classifier, a Linear that stands alone at its end, "
            f"which a new one replaces; {facts.model} has none. Give it one, of any number of "
            "classes; or state which it is, pretrained_cfg = {'classifier': 'PATH'}."
        )
    if settings.linear_probe:
        made = AdapterConfig(facts.model, preprocess=facts.preprocess, num_classes=classes)
        check_place(backbone.model, facts, made)
        return replace_classifier(backbone.model, facts.classifier, classes, seed=seed)
    check_sites(facts)
    config = AdapterConfig(
        base_model=facts.model,
        form=settings.form,
        reflection=settings.reflection,
        r=settings.r,
        target_modules=settings.target_modules,
        base_model_args=dict(facts.args),
        base_sha256=facts.sha256,
        num_classes=classes,
        class_names=folder.class_names,
        preprocess=facts.preprocess,
        problem_type=None if folder.problem_type == CLASSES else folder.problem_type,
    )
    return attach(backbone.model, config, seed=seed)


def replace_classifier(model: nn.Module, path: str, classes: int, *, seed: int) -> nn.Module:
    """Freeze ``model`` and put a new, trainable Linear at ``path``; in place, returns ``model``.

    Weight (classes, dim) is normal with standard deviation 0.02 from ``seed``, bias zero.
    """
    model.requires_grad_(False)
    old = model.get_submodule(path)
    assert isinstance(old, nn.Linear)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(classes, old.in_features, generator=generator) * _HEAD_STD
    head = linear_of(weight, torch.zeros(classes))
    replace_module(model, path, head.to(old.weight.device, old.weight.dtype))
    return model


def _run(task: _Task, trainer: Trainer, progress: OnReport) -> tuple[EpochReport, ...]:
    """All epochs that are left; the state on disk follows every one of them."""
    history: tuple[EpochReport, ...] = ()
    if task.state is not None and task.settings.resume:
        saved = task.state.read(task.identity)
        trainer.load_state_tensors(saved.tensors, saved.epoch)
        history = saved.history
    for epoch in range(len(history) + 1, task.settings.epochs + 1):
        report = _epoch(task, trainer, epoch, progress)
        history = (*history, report)
        if task.state is not None:
            saved = SavedTraining(epoch, trainer.state_tensors(), history)
            task.state.write(saved, task.identity)
        progress(report)
    return history


def _epoch(
    task: _Task, trainer: Trainer, epoch: int, on_step: Callable[[StepReport], None]
) -> EpochReport:
    try:
        return trainer.run_epoch(epoch, on_step)
    except TrainingError:
        # Diverged: resuming would only diverge again, so nothing is left to stand in the way.
        if task.state is not None:
            task.state.discard()
        raise


def _result(task: _Task, trainer: Trainer, history: tuple[EpochReport, ...]) -> TrainResult:
    prefix = f"{task.facts.classifier}."
    head = sum(p.numel() for n, p in trainer.parameters.items() if n.startswith(prefix))
    total = sum(p.numel() for p in trainer.parameters.values())
    probe = task.settings.linear_probe
    return TrainResult(
        out=task.settings.out,
        linear_probe=probe,
        class_names=task.folder.class_names,
        train_images=len(task.folder.train),
        val_images=len(task.folder.val),
        train_data=task.folder.sources[0],
        val_data=task.folder.sources[1],
        skipped=task.folder.skipped,
        sites=0 if probe else len(extract(task.model).sites),
        parameters=total - head,
        head_parameters=head,
        device=trainer.device.type,
        history=history,
        problem_type=task.folder.problem_type,
        val_images_trained_on=task.folder.val_trained_on,
        contrary_pictures=task.folder.contrary,
        unread=task.folder.unread,
    )


def _write(task: _Task, result: TrainResult, objective: Objective) -> None:
    """Write the output, then drop the state: in this order, so that nothing can be lost."""
    if result.out is None:
        return
    overwrite = task.settings.overwrite
    record = _record(task, result, objective)
    if result.linear_probe:
        with atomic_directory(result.out, overwrite=overwrite, kind=ADAPTER) as scratch:
            write_json(scratch / METRICS_FILE, {**result.to_json(), "training": record})
    else:
        adapter = extract(task.model)
        assert adapter.head is not None
        adapter = replace(adapter, head=objective.restored(adapter.head))
        save_adapter(_with_record(adapter, record), result.out, overwrite=overwrite)
    if task.state is not None:
        task.state.discard()


def _with_record(adapter: Adapter, record: Mapping[str, Any]) -> Adapter:
    extra = {**adapter.config.extra, "training": dict(record)}
    return replace(adapter, config=replace(adapter.config, extra=extra))


def _record(task: _Task, result: TrainResult, objective: Objective) -> dict[str, Any]:
    """The ``training`` key of adapter_config.json: how the adapter came about."""
    s, best = task.settings, result.best
    augmentation = {"crop_area": CROP_AREA, "crop_ratio": CROP_RATIO, "flip": s.flip}
    return {
        "recipe": {
            "optimizer": "AdamW",
            "lr": s.lr,
            "weight_decay": s.weight_decay,
            "schedule": "linear warm-up, cosine",
            "warmup_epochs": s.warmup,
            "epochs": s.epochs,
            "batch_size": s.batch_size,
            "loss": objective.name,
            "augmentation": augmentation if s.augment else None,
            "weights": "last epoch",
        },
        "seed": s.seed,
        "train_images": result.train_images,
        "val_images": result.val_images,
        "val_images_trained_on": result.val_images_trained_on,
        "train_loss": result.last.loss,
        "val_top1": result.last.val_top1,
        **_other_scores(result.last),
        "best_val_top1": best.val_top1 if best else None,
        "best_epoch": best.epoch if best else None,
        "device": result.device,
        "versions": {
            "hhdeploy": own_version(),
            "torch": torch.__version__,
            **_version_of_source(task.facts.model),
            "python": platform.python_version(),
        },
    }


def _version_of_source(model: str) -> dict[str, str]:
    """Version of the package that the model came from; of a function nobody knows."""
    source, colon, _ = model.partition(":")
    package = source if colon else "timm"
    return {} if package == "python" else {package: version(package)}


def _other_scores(report: EpochReport) -> dict[str, float]:
    """Those of labels and of values, where they are scored."""
    scores = {"val_map": report.val_map, "val_mae": report.val_mae}
    return {name: score for name, score in scores.items() if score is not None}
