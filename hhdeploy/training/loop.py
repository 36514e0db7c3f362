"""The optimisation itself: AdamW, warm-up and cosine, epochs and validation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hhdeploy.training.data import BatchSource, ImageFolder, Samples
from hhdeploy.training.objective import Objective, Score
from hhdeploy.training.settings import EpochReport, StepReport, TrainingError, TrainSettings
from hhdeploy.training.state import as_floats

_MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, *, peak: float, warmup_steps: int, total_steps: int) -> float:
    """lr of step 0, 1, ...: linear up to ``peak`` in ``warmup_steps``, then a half cosine to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return peak * 0.5 * (1.0 + math.cos(math.pi * done))


class Trainer:
    """Trains the parameters of ``model`` that require gradients; the rest stays frozen.

    The model stays in eval mode throughout (no dropout, no batch statistics), and the
    parametrized weights are computed once per step.
    """

    def __init__(
        self,
        model: nn.Module,
        settings: TrainSettings,
        folder: ImageFolder,
        batches: BatchSource,
        device: torch.device,
    ) -> None:
        self.model, self.settings, self.folder = model.eval(), settings, folder
        self.batches, self.device = batches, device
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            list(self.parameters.values()), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.steps = batches.steps(folder.train)
        everything = folder.train.truths(range(len(folder.train)))
        self.objective = Objective.of(folder.problem_type, everything)

    def run_epoch(self, epoch: int, on_step: Callable[[StepReport], None]) -> EpochReport:
        """Train one epoch (counted from 1) and validate.

        Raises:
            TrainingError: when the loss or a trained value is not finite any more.
        """
        settings, total, seen, lr = self.settings, 0.0, 0, 0.0
        stream = self.batches.training(
            self.folder.train,
            seed=settings.seed,
            epoch=epoch,
            augment=settings.augment,
            flip=settings.flip,
        )
        for step, (images, labels) in enumerate(stream, start=1):
            lr = learning_rate(
                (epoch - 1) * self.steps + step - 1,
                peak=settings.lr,
                warmup_steps=settings.warmup * self.steps,
                total_steps=settings.epochs * self.steps,
            )
            loss = self._step(images, labels, lr)
            if not math.isfinite(loss):
                raise self._diverged(f"the loss is {loss} in epoch {epoch}, step {step}")
            total, seen = total + loss * len(labels), seen + len(labels)
            on_step(StepReport(epoch, step, self.steps, loss, lr))
        if not all(bool(torch.isfinite(p).all()) for p in self.parameters.values()):
            raise self._diverged(f"a trained value is NaN or infinite after epoch {epoch}")
        (top1, average, error), val_loss = self.evaluate(self.folder.val)
        if val_loss is not None and not math.isfinite(val_loss):
            raise self._diverged(f"the validation loss is {val_loss} after epoch {epoch}")
        return EpochReport(epoch, total / seen, lr, top1, val_loss, average, error)

    def _step(self, images: Tensor, labels: Tensor, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.zero_grad(set_to_none=True)
        with parametrize.cached():
            logits = self.model(images.to(self.device))
            loss = self.objective.loss(logits, labels.to(self.device))
            loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return float(loss.item())

    def evaluate(self, samples: Samples) -> tuple[tuple[Score, Score, Score], float | None]:
        """`Objective.scores` and the mean loss; nothing but None without images."""
        if not len(samples):
            return (None, None, None), None
        outputs, truths, total = [], [], 0.0
        with torch.no_grad(), parametrize.cached():
            for images, labels in self.batches.evaluation(samples):
                outputs.append(self.model(images.to(self.device)))
                truths.append(labels.to(self.device))
                total += float(self.objective.loss(outputs[-1], truths[-1], reduction="sum"))
        scores = self.objective.scores(torch.cat(outputs), torch.cat(truths))
        return scores, total / len(samples)

    def state_tensors(self) -> dict[str, NDArray[Any]]:
        """Trained values and AdamW's moments by name, on the CPU: ``<part>/<parameter>``."""
        tensors = {f"value/{name}": _numpy(p) for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            for moment in _MOMENTS:
                if moment in (state := self.optimizer.state.get(parameter, {})):
                    tensors[f"{moment}/{name}"] = _numpy(state[moment])
        return tensors

    def load_state_tensors(self, tensors: Mapping[str, NDArray[Any]], epoch: int) -> None:
        """Continue after ``epoch`` whole epochs from what `state_tensors` gave then.

        Raises:
            TrainingError: when names or shapes are not this model's.
        """
        for name, parameter in self.parameters.items():
            with torch.no_grad():
                parameter.copy_(self._stored(tensors, f"value/{name}", parameter))
            if f"{_MOMENTS[0]}/{name}" in tensors:
                moments = {m: self._stored(tensors, f"{m}/{name}", parameter) for m in _MOMENTS}
                # AdamW counts steps in a float tensor, one a parameter.
                steps = torch.tensor(float(epoch * self.steps))
                self.optimizer.state[parameter] = {"step": steps, **moments}

    def _stored(
        self, tensors: Mapping[str, NDArray[Any]], key: str, parameter: nn.Parameter
    ) -> Tensor:
        found = tensors.get(key)
        if found is None or found.shape != tuple(parameter.shape):
            shape = "nothing" if found is None else list(found.shape)
            raise TrainingError(
                f"`resume`: stored tensor {key}: expected shape {list(parameter.shape)}, found "
                f"{shape}. Delete the directory of the unfinished training to start over."
            )
        return torch.from_numpy(as_floats(found)).to(self.device)

    def _diverged(self, detail: str) -> TrainingError:
        return TrainingError(
            f"the training diverged: {detail}. Start again with a lower `lr` (it was "
            f"{self.settings.lr:g}) or more `warmup_epochs` (it was {self.settings.warmup})."
        )


def _numpy(tensor: Tensor) -> NDArray[Any]:
    array: NDArray[Any] = tensor.detach().cpu().numpy().copy()
    return array
